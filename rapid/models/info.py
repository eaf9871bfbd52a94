"""What processes without the model need to know of it; apart, so that they need not load transformers' model code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelInfo:
    """What others need to know of a loaded model. ``window`` is in tokens, prompt and output together."""

    name: str
    window: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    dtype: str
    quantization: str
    device: str
    weight_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True)
class RankPlacement:
    """Rank ``rank`` of ``num_ranks``, which meet at ``address`` ("host:port" of the first)."""

    rank: int
    num_ranks: int
    address: str
