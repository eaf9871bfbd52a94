"""The facts about a model that processes without the model need; they need not load transformers' model code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelInfo:
    """The facts about a loaded model.

    ``window`` is in tokens, prompt and output together. ``attention`` names the kernels that read keys and values.
    """

    name: str
    window: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    dtype: str
    quantization: str
    device: str
    attention: str
    weight_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True)
class RankPlacement:
    """Rank ``rank`` of ``num_ranks``, which meet at ``address`` ("host:port" of the first rank)."""

    rank: int
    num_ranks: int
    address: str


@dataclass(frozen=True)
class GraphLimits:
    """How long the recording of CUDA graphs may take, and how much memory; 0 records nothing.

    Passes of the shapes that are left out run eagerly.
    """

    seconds: float = 60.0
    gib: float = 1.0

    @property
    def bytes(self) -> int:
        return int(self.gib * 2**30) if self.seconds else 0
