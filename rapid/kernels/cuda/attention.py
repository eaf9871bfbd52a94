"""Attention through a block table, from device tensors only: PyTorch's varlen kernel, or else SDPA."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from rapid.kernels.interface import Batch, BatchEntry
from rapid.kv_cache.pool import KVLayout, KVPool

PAGE_SIZE = 256  # FlashAttention 2 requires it of a block table


@dataclass
class PagedBatch:
    """S sequences and T tokens. Every field that changes between passes is a tensor on the device.

    ``slots`` int64 [T]: where each new token is written. ``table`` int32 [S, P]: each sequence's pages.
    ``lengths`` int32 [S]: tokens per sequence, the new ones included. ``starts`` int32 [S + 1]: where each sequence's
    tokens begin. ``max_new``: the most new tokens of one sequence.
    """

    pool: KVPool
    slots: Tensor
    table: Tensor
    lengths: Tensor
    starts: Tensor
    max_new: int
    kernel: PagedKernel

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys, values = self.pool.keys[layer], self.pool.values[layer]  # [slots, KV heads, d]
        keys.index_copy_(0, self.slots, key)
        values.index_copy_(0, self.slots, value)
        pages = (-1, self.pool.page_size, *keys.shape[1:])
        output = self.kernel(query, keys.view(pages), values.view(pages), self, scaling)
        return output.reshape(len(query), -1)

    def on(self, device: torch.device) -> PagedBatch:
        """The same batch for layers on ``device``."""
        here = {name: getattr(self, name).to(device) for name in ("slots", "table", "lengths", "starts")}
        return replace(self, **here)


class _SpreadBatch:
    """A batch over layers on several devices: each layer reads the tensors on its own device."""

    def __init__(self, batch: PagedBatch, devices: Sequence[torch.device]) -> None:
        on = {device: batch.on(device) for device in set(devices)}
        self._of_layer = [on[device] for device in devices]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        return self._of_layer[layer].attend(layer, query, key, value, scaling)


# (query [T, heads, d], key pages [pages, page size, KV heads, d], value pages, batch, scaling) to [T, heads, d]
PagedKernel = Callable[[Tensor, Tensor, Tensor, PagedBatch, float], Tensor]


class PagedAttention:
    """The attention backend over FlashAttention's block tables. ``kernel`` defaults to the device's best."""

    def __init__(self, kernel: PagedKernel | None = None, page_size: int = PAGE_SIZE) -> None:
        self._kernel = kernel or best_kernel()
        self._page_size = page_size

    def pool(self, layout: KVLayout, budget_bytes: int) -> KVPool:
        return KVPool(layout, budget_bytes, page_size=self._page_size, slot_major=True)

    def batch(self, entries: Sequence[BatchEntry]) -> Batch:
        pool = entries[0].cache.pool
        device, devices = pool.layout.device, pool.layout.devices
        counts = [(cache, len(tokens)) for cache, tokens, _ in entries]
        tables = [cache.pages[: pool.pages_for(cache.length + n)] for cache, n in counts]
        width = max(len(table) for table in tables)
        batch = PagedBatch(
            pool=pool,
            slots=torch.tensor([slot for cache, n in counts for slot in cache.slots(n)], device=device),
            table=torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32).to(device),
            lengths=torch.tensor([cache.length + n for cache, n in counts], dtype=torch.int32).to(device),
            starts=torch.tensor([0, *accumulate(n for _, n in counts)], dtype=torch.int32).to(device),
            max_new=max(n for _, n in counts),
            kernel=self._kernel,
        )
        return batch if set(devices) == {device} else _SpreadBatch(batch, devices)

    def empty_batch(self, pool: KVPool, num_sequences: int, num_new: int, width: int) -> PagedBatch:
        """A batch of ``num_sequences`` × ``num_new`` tokens that the caller fills in; it points at the spare page."""
        device = pool.layout.device
        return PagedBatch(
            pool=pool,
            slots=torch.full((num_sequences * num_new,), pool.spare_slot, device=device),
            table=torch.full((num_sequences, width), pool.num_pages, dtype=torch.int32, device=device),
            lengths=torch.full((num_sequences,), num_new, dtype=torch.int32, device=device),
            starts=torch.arange(0, num_sequences * num_new + 1, num_new, dtype=torch.int32, device=device),
            max_new=num_new,
            kernel=self._kernel,
        )


def best_kernel() -> PagedKernel:
    """varlen attention if this PyTorch's version of it accepts a block table, else SDPA."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return gathered_sdpa
    known = inspect.signature(varlen_attn).parameters
    if not torch.cuda.is_available() or not {"block_table", "seqused_k", "enable_gqa"} <= set(known):
        return gathered_sdpa
    return _varlen


def _varlen(query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scaling: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query,
        keys,
        values,
        batch.starts,
        None,
        batch.max_new,
        batch.table.shape[1] * batch.pool.page_size,
        scale=scaling,
        window_size=(-1, 0),  # causal, aligned at the end
        enable_gqa=True,
        seqused_k=batch.lengths,
        block_table=batch.table,
    )
    assert isinstance(output, Tensor)
    return output


def gathered_sdpa(query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scaling: float) -> Tensor:
    """Copies each sequence's pages side by side and pads to the longest: slower, but correct on every device."""
    table = batch.table.long()
    num_sequences, width = table.shape
    shape = (num_sequences, width * batch.pool.page_size, *keys.shape[2:])
    # Memory behind a sequence's end may hold NaN, and even a weight of 0 does not make a NaN harmless.
    empty = torch.arange(shape[1], device=query.device) >= batch.lengths[:, None]
    all_keys, all_values = (
        pages[table].reshape(shape).masked_fill(empty[:, :, None, None], 0).transpose(1, 2) for pages in (keys, values)
    )
    new = batch.starts.diff()[:, None]  # [S, 1]
    offsets = torch.arange(batch.max_new, device=query.device)
    rows = (batch.starts[:-1, None] + offsets).clamp_max(len(query) - 1).long()  # [S, max_new], padded at the end
    padded = query[rows].transpose(1, 2)  # [S, heads, max_new, d]
    last_seen = (batch.lengths[:, None] - new + offsets)[:, None, :, None]
    seen = torch.arange(width * batch.pool.page_size, device=query.device) <= last_seen
    output = F.scaled_dot_product_attention(
        padded, all_keys, all_values, attn_mask=seen, scale=scaling, enable_gqa=True
    )
    sequence_of = torch.bucketize(torch.arange(len(query), device=query.device), batch.starts[1:], right=True)
    offset_of = torch.arange(len(query), device=query.device) - batch.starts[sequence_of]
    return output[sequence_of, :, offset_of]
