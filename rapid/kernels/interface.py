"""What a forward pass needs of a device: how it stores keys and values, and how it attends over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from rapid.kv_cache.pool import KVCache, KVLayout, KVPool

Tokens = Sequence[int] | Tensor


class BatchEntry(NamedTuple):
    """Tokens to append to a sequence's cache, on the host or on the device; the last ``num_rows`` want logits."""

    cache: KVCache
    tokens: Tokens
    num_rows: int


class Batch(Protocol):
    """One forward pass's view of the pool: writes new keys and values of a layer, and attends over what is there."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """``query`` [total, heads, d], ``key``, ``value`` [total, KV heads, d] to [total, heads·d].

        Query head h reads KV head h // (heads / KV heads).
        """
        ...


class AttentionBackend(Protocol):
    """How a device stores and reads keys and values."""

    def pool(self, layout: KVLayout, budget_bytes: int) -> KVPool: ...
    def batch(self, entries: Sequence[BatchEntry]) -> Batch: ...
