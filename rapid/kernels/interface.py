"""The interface between a forward pass and a device's attention, which stores keys and values and reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from rapid.kv_cache.pool import KVLayout, KVPool
from rapid.kv_cache.table import PageTable

Tokens = Sequence[int] | Tensor
Rotation = tuple[Tensor, Tensor]  # the cosines and sines, [total, d] each, by which queries and keys are turned

# (layer, an entry's rotated queries [n, heads, d], scaling): watches what the tokens of an entry look for.
QueryWatcher = Callable[[int, Tensor, float], None]


class BatchEntry(NamedTuple):
    """Tokens (on the host or the device) to append to a sequence's cache; the last ``num_rows`` of them get logits."""

    cache: PageTable
    tokens: Tokens
    num_rows: int


class Batch(Protocol):
    """One forward pass's view of the pool: writes a layer's new keys and values, and attends over all of them."""

    def attend(self, layer: int, heads: Tensor, rotation: Rotation, scaling: float) -> Tensor:
        """``heads`` [total, heads + 2 · KV heads, d], queries, keys and values side by side, to [total, heads·d].

        Queries and keys are rotated first; the function may overwrite ``heads``. Query head h reads KV head
        h // (heads / KV heads).
        """
        ...


class AttentionBackend(Protocol):
    """How a device stores and reads keys and values. ``name`` says by which kernels."""

    @property
    def name(self) -> str: ...
    def pool(self, layout: KVLayout, budget_bytes: int) -> KVPool: ...
    def batch(self, entries: Sequence[BatchEntry]) -> Batch: ...
