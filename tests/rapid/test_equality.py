"""On a real model, greedy decoding by every strategy and rule writes transformers' own text, token for token."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rapid.backend.local import LocalBackend
from rapid.datastore.search import SEPARATOR, Datastore, Segment, suffix_array
from rapid.engine.engine import Engine
from rapid.events import Finish, Statistics
from rapid.generate import generate
from rapid.models.loader import load_model
from rapid.models.model import Model
from rapid.request import GenerationRequest
from rapid.sampling.params import SamplingParams
from rapid.speculation.params import SpeculationParams
from rapid.speculation.verification import RULES
from rapid.text.encoding import encode_in_pieces
from rapid.text.prompts import Message, Prompt, read_chat

NUM_TOKENS = 40
Case = tuple[str, int | str, str]
CASES: list[Case] = [
    ("autoregressive", 0, "lossless"),
    ("lookup", 5, "lossless"),
    ("rest", "auto", "lossless"),
    *(("rest", gamma, "lossless") for gamma in (1, 4, 10)),
    ("speculative", 4, "lossless"),
    *((strategy, gamma, "lossless") for strategy in ("magicdec", "triforce") for gamma in (1, 4, 10, "auto")),
    ("rapid", "auto", "published"),
    ("rapid", 1, "published"),
    *(("rapid", 10, rule) for rule in RULES),
]


class Chunk(NamedTuple):
    content: int
    text: str
    start: int
    end: int
    position: int = 0
    score: float = 1.0


class Retrieval(NamedTuple):
    chunks: list[Chunk]
    context_tokens: int = 0
    retrieved_tokens: int = 0
    reaches_threshold: bool = True
    confidence: float = 1.0


def middle(contents: list[str], query: str, options: Any) -> Retrieval:
    """A retriever that keeps 600 characters from the middle."""
    start = len(contents[0]) // 2
    return Retrieval([Chunk(0, contents[0][start : start + 600], start, start + 600)])


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("smollm2-135m-instruct", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def prompt(model: Model, data_file: Callable[[str], Path]) -> Prompt:
    """About 600 tokens of a novel, and a question."""
    document = data_file("moby-dick.txt").read_text(encoding="utf-8")[30_000:32_400]
    assert model.tokenizer is not None
    read = read_chat([Message("user", f"{document}\n\nWho tells this story, and where?")], model.tokenizer)
    assert read.contents and 500 < len(read.tokens) < 800
    return read


@pytest.fixture(scope="module")
def expected(smollm: Path, prompt: Prompt) -> list[int]:
    """What transformers writes by itself, with its own attention and cache."""
    network = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    tokens = torch.tensor([prompt.tokens])
    mask = torch.ones_like(tokens)
    written = network.generate(tokens, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False)
    return written[0, tokens.shape[1] :].tolist()


@pytest.fixture(scope="module")
def backend(model: Model) -> Iterator[LocalBackend]:
    """One engine drafts for itself: drafts are often right, but not always, since it drafts from less."""
    engine = Engine(model, kv_bytes=2**30, max_batch_tokens=1024, idle_timeout=3600)
    yield LocalBackend(engine, engine, middle)
    engine.shutdown()


@pytest.fixture(scope="module")
def datastore(model: Model, data_file: Callable[[str], Path]) -> Datastore:
    """The novel that the prompt is from."""
    assert model.tokenizer is not None
    text = data_file("moby-dick.txt").read_text(encoding="utf-8")
    tokens = np.array([*encode_in_pieces(model.tokenizer, text), SEPARATOR], np.uint32)
    return Datastore([Segment(tokens, suffix_array(tokens))])


@pytest.fixture(scope="module")
def written(backend: LocalBackend, prompt: Prompt, datastore: Datastore) -> dict[Case, tuple[list[int], Statistics]]:
    """What each case writes, and its statistics. All run at once, so they also share forward passes."""

    async def write(strategy: str, gamma: int | str, rule: str) -> tuple[list[int], Statistics]:
        speculation = SpeculationParams(
            strategy, num_draft_tokens=gamma, transfer_strength=20.0, verification=rule, draft_cache_tokens=128
        )
        request = GenerationRequest(
            prompt, SamplingParams(temperature=0), speculation, max_tokens=NUM_TOKENS, datastore=datastore
        )
        *deltas, finish = [event async for event in generate(request, backend)]
        assert isinstance(finish, Finish)
        return [token for delta in deltas for token in delta.tokens], finish.statistics

    async def all_cases() -> list[tuple[list[int], Statistics]]:
        return await asyncio.gather(*(write(*case) for case in CASES))

    return dict(zip(CASES, asyncio.run(all_cases()), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_greedy_text_is_transformers_own(
    written: dict[Case, tuple[list[int], Statistics]], expected: list[int], case: Case
) -> None:
    tokens, statistics = written[case]
    assert tokens == expected
    if statistics.strategy in ("speculative", "magicdec", "triforce", "rapid") and case[1] != "auto":
        assert 0 < statistics.accepted < statistics.drafted  # both outcomes were put to the test
    if statistics.strategy == "rest" and case[1] != "auto":
        assert 0 < statistics.datastore_accepted == statistics.accepted < statistics.drafted
