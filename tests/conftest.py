"""What several tests need: real texts, the embedded model, and models so tiny that their output can be enumerated."""

from __future__ import annotations

import rapid  # noqa: F401 (before torch: it says how PyTorch's threads are to wait)

# isort: split
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rapid.engine.engine import Engine
from rapid.models.model import Model
from rapid.text.tokenizer import load_tokenizer
from rapid.weights.embedded_models import local_path

DATA = Path(__file__).parents[2] / "shared" / "data"
LETTERS = "\n abcdefghijklmnopqrstuvwxyz?"


@pytest.fixture(scope="session")
def data_file() -> Callable[[str], Path]:
    """The path of a real text; skips the test where the texts are absent."""

    def path(name: str) -> Path:
        if not (DATA / name).is_file():
            pytest.skip(f"{DATA / name} is absent")
        return DATA / name

    return path


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The folder of the embedded language model."""
    return local_path("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def chat_tokenizer(smollm: Path) -> PreTrainedTokenizerFast:
    """A real tokenizer with a chat template."""
    return load_tokenizer(str(smollm))


@pytest.fixture(scope="session")
def letter_tokenizer() -> Callable[[int], PreTrainedTokenizerFast]:
    """A tokenizer of the first ``size`` of LETTERS, a token each: "\\n", " ", "a", "b" and so on."""

    def make(size: int) -> PreTrainedTokenizerFast:
        vocabulary = {letter: i for i, letter in enumerate(LETTERS[:size])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=LETTERS[size - 1]))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    return make


@pytest.fixture(scope="session")
def tiny_network() -> Callable[..., PreTrainedModel]:
    """Random networks of a few thousand weights, whose predictions differ from context to context.

    The same arguments give the same weights. Without ``eos`` nothing but a limit ends the output. ``more`` are fields
    of the config.
    """

    def make(
        vocab_size: int = 32,
        *,
        kind: str = "llama",
        seed: int = 0,
        layers: int = 2,
        window: int = 512,
        eos: int | None = None,
        **more: Any,
    ) -> PreTrainedModel:
        fields = {
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": window,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": eos,
            "pad_token_id": None,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields | more)).eval()

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_network: Callable[..., PreTrainedModel]) -> Callable[..., Model]:
    """Models of tiny networks; ``attention`` and ``quantization`` are the model's, all else the network's."""

    def make(vocab_size: int = 32, *, seed: int = 0, **options: Any) -> Model:
        chosen = {name: options.pop(name) for name in ("attention", "quantization") if name in options}
        return Model(tiny_network(vocab_size, seed=seed, **options), None, f"tiny-{seed}", **chosen)

    return make


@pytest.fixture
def engine() -> Iterator[Callable[..., Engine]]:
    """Makes engines with room for plenty of tiny sequences, and shuts them down after the test."""
    engines: list[Engine] = []

    def make(model: Model, *, kv_bytes: int = 2**24, **options: Any) -> Engine:
        engines.append(Engine(model, kv_bytes=kv_bytes, **options))
        return engines[-1]

    yield make
    for made in engines:
        made.shutdown()
