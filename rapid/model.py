"""A causal language model from transformers, run on ragged batches over per-sequence KV caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rapid import attention, catalog
from rapid.attention import Segment
from rapid.errors import ModelFileError
from rapid.kv_cache import KVCache, KVLayout
from rapid.model_info import ModelInfo
from rapid.tokenization import load_tokenizer


class Model:
    """Weights, tokenizer and the ragged forward pass.

    ``vocab_size`` is the tokenizer's: a checkpoint may pad its output rows beyond it, and those never take part.
    """

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str) -> None:
        config = network.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"} or network.config._attn_implementation != attention.NAME:
            raise ModelFileError(
                f"{name}: only decoders with full attention in every layer are supported, found {kinds}"
            )
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.vocab_size = min(config.vocab_size, len(tokenizer)) if tokenizer is not None else config.vocab_size
        self.layout = KVLayout(
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=network.dtype,
            device=network.device,
        )
        self.info = ModelInfo(
            name=name,
            window=config.max_position_embeddings,
            vocab_size=self.vocab_size,
            eos_token_ids=_eos_token_ids(network),
            dtype=str(network.dtype).removeprefix("torch."),
            device=str(network.device),
            weight_bytes=sum(p.nbytes for p in network.parameters()),
            kv_bytes_per_token=self.layout.bytes_per_token,
        )

    @classmethod
    def load(cls, ref: str, *, dtype: str = "auto", device: str = "auto") -> Model:
        """Loads an embedded model by name, a local folder, or a Hugging Face hub id.

        Raises:
            ModelFileError: the files are missing, unreadable, or of an unsupported architecture.
        """
        device = default_device() if device == "auto" else device
        torch_dtype = default_dtype(device) if dtype == "auto" else cast(torch.dtype, getattr(torch, dtype))
        tokenizer = load_tokenizer(ref)
        try:
            network = AutoModelForCausalLM.from_pretrained(
                catalog.resolve(ref), dtype=torch_dtype, device_map=device, attn_implementation=attention.NAME
            )
        except (OSError, ValueError, KeyError) as error:
            raise ModelFileError(f"the model {ref!r} could not be loaded: {error}") from error
        return cls(network, tokenizer, ref)

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for ``capacity`` tokens."""
        return KVCache(self.layout, capacity)

    @torch.inference_mode()
    def forward(self, segments: Sequence[tuple[KVCache, Sequence[int], int]]) -> list[Tensor]:
        """Appends tokens to several sequences in one pass.

        Each segment is (cache, n ≥ 1 tokens to append, how many of their last positions want logits). Returns for each
        the logits of those positions, [rows, V] in float32. Every cache is n tokens longer afterwards.
        """
        tokens: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for cache, new, num_rows in segments:
            positions.extend(range(cache.length, cache.length + len(new)))
            tokens.extend(new)
            wanted.extend(range(len(tokens) - num_rows, len(tokens)))
        device = self.layout.device
        # transformers' own types do not know of keyword arguments meant for the attention function.
        run: Any = self.network
        logits = run(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, dtype=torch.long, device=device),
            segments=[Segment(cache, len(new)) for cache, new, _ in segments],
        ).logits[0, :, : self.vocab_size]
        for cache, new, _ in segments:
            cache.advance(len(new))
        return list(logits.float().split([num_rows for _, _, num_rows in segments]))


def default_device() -> str:
    """The first CUDA device when there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32."""
    native = torch.cuda.is_bf16_supported() if device.startswith("cuda") else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def _eos_token_ids(network: PreTrainedModel) -> frozenset[int]:
    generation = getattr(network, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None) or network.config.eos_token_id
    return frozenset([eos] if isinstance(eos, int) else eos or [])
