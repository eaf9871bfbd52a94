"""Attention through a block table, from device tensors only: batches for any paged kernel, and SDPA as the reference.

Few new tokens (a decode step, a draft step, a verification) and many (a prefill chunk) want different kernels, and a
pass may hold both. A batch then has parts: all sequences of few new tokens in one, each sequence of many in its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from rapid.kernels.cpu.rows import rotate
from rapid.kernels.cuda.paged_split import SharedPrefix
from rapid.kernels.interface import Batch, BatchEntry, Rotation
from rapid.kernels.prefix import PrefixGroup, prefix_groups
from rapid.kernels.transfer import upload
from rapid.kv_cache.pool import KVLayout, KVPool

PAGE_SIZE = 256  # FlashAttention 2 requires it of a block table
FP8 = torch.float8_e4m3fn  # the type of stored keys and values with ``kv_dtype`` fp8
FEW_TOKENS = 17  # new tokens of one sequence: a verification of 16 draft tokens

# Reading this much takes an H100 about 5 µs. One more launch a layer is believed to cost as much.
WORTH_SHARING_BYTES = 16 * 2**20


@dataclass
class PagedBatch:
    """S sequences and T tokens. Every field that changes between passes is a tensor on the device.

    ``slots`` int64 [T]: where each new token is written. ``table`` int32 [S, P]: each sequence's pages.
    ``lengths`` int32 [S]: tokens per sequence, the new ones included. ``starts`` int32 [S + 1]: where each sequence's
    tokens begin. Tokens behind the last start belong to no sequence, and attend to nothing. ``max_new``: the most new
    tokens of one sequence. ``parts``: if the sequences need different kernels, batches of some of them, each with the
    places (int64) of its tokens among the T. ``prefix``: which sequences share their first pages, if a kernel that can
    gains by it; for the others the table is complete.
    """

    pool: KVPool
    slots: Tensor
    table: Tensor
    lengths: Tensor
    starts: Tensor
    max_new: int
    kernel: PagedKernel
    writer: Writer
    parts: tuple[tuple[Tensor, PagedBatch], ...] = ()
    prefix: SharedPrefix | None = None

    def attend(self, layer: int, heads: Tensor, rotation: Rotation, scaling: float) -> Tensor:
        keys, values = self.pool.keys[layer], self.pool.values[layer]  # [slots, KV heads, d]
        query = self.writer(heads, rotation, self.slots, keys, values)
        pages = (-1, self.pool.page_size, *keys.shape[1:])
        keys, values = keys.view(pages), values.view(pages)
        if not self.parts:
            return self.kernel(query, keys, values, self, scaling).reshape(len(query), -1)
        output = torch.empty_like(query)
        for rows, part in self.parts:
            output.index_copy_(0, rows, self.kernel(query.index_select(0, rows), keys, values, part, scaling))
        return output.reshape(len(query), -1)

    def on(self, device: torch.device) -> PagedBatch:
        """The same batch for layers on ``device``."""
        here = {name: getattr(self, name).to(device) for name in ("slots", "table", "lengths", "starts")}
        parts = tuple((rows.to(device), part.on(device)) for rows, part in self.parts)
        return replace(self, **here, parts=parts, prefix=self.prefix.to(device) if self.prefix else None)


def rotate_and_write(heads: Tensor, rotation: Rotation, slots: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Rotates queries and keys of ``heads``, writes keys and values, and returns the queries, by PyTorch's operators.

    `rapid.kernels.cuda.fused` has the same in one kernel.
    """
    kv_heads = keys.shape[1]
    num_heads = heads.shape[1] - 2 * kv_heads
    heads = rotate(heads, *rotation, num_heads + kv_heads)
    write(heads[:, num_heads : num_heads + kv_heads], slots, keys)
    write(heads[:, num_heads + kv_heads :], slots, values)
    return heads[:, :num_heads]


def write(new: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Writes ``new`` [T, KV heads, d] to ``slots`` [T] of ``rows`` [slots, KV heads, d], in the type of ``rows``."""
    if rows.dtype == FP8:
        # Not every operator knows 8-bit floats, so their bytes are copied.
        new, rows = new.to(FP8).view(torch.uint8), rows.view(torch.uint8)
    rows.index_copy_(0, slots, new)


def gathered(pages: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """The pages of an int64 ``table`` of any shape, in ``dtype``: [*table's shape, page size, KV heads, d]."""
    if pages.dtype == FP8:
        return pages.view(torch.uint8)[table].view(FP8).to(dtype)
    return pages[table]


class _SpreadBatch:
    """A batch over layers on several devices: each layer reads the tensors on its own device."""

    def __init__(self, batch: PagedBatch, devices: Sequence[torch.device]) -> None:
        on = {device: batch.on(device) for device in set(devices)}
        self._of_layer = [on[device] for device in devices]

    def attend(self, layer: int, heads: Tensor, rotation: Rotation, scaling: float) -> Tensor:
        return self._of_layer[layer].attend(layer, heads, rotation, scaling)


# (query [T, heads, d], key pages [pages, page size, KV heads, d], value pages, batch, scaling) to [T, heads, d]
PagedKernel = Callable[[Tensor, Tensor, Tensor, PagedBatch, float], Tensor]
# (heads [T, heads + 2 · KV heads, d], rotation, slots [T], key rows [slots, KV heads, d], value rows) to [T, heads, d]
Writer = Callable[[Tensor, Rotation, Tensor, Tensor, Tensor], Tensor]


class PagedAttention:
    """The attention backend over block tables.

    `rapid.kernels.cuda.choice` finds a device's best ``kernel``, and `rapid.kernels.cuda.fused` its ``writer``.
    """

    def __init__(self, kernel: PagedKernel, page_size: int = PAGE_SIZE, writer: Writer = rotate_and_write) -> None:
        self.kernel, self.writer = kernel, writer
        self.page_size = page_size

    @property
    def name(self) -> str:
        return kernel_name(self.kernel)

    @property
    def can_be_recorded(self) -> bool:
        """Whether passes of few new tokens may be recorded as graphs (`recordable`)."""
        return bool(getattr(self.kernel, "recordable", False))

    def pool(self, layout: KVLayout, budget_bytes: int) -> KVPool:
        pool = KVPool(layout, budget_bytes, page_size=self.page_size, slot_major=True)
        for rows in (*pool.keys, *pool.values):
            if rows.is_cuda:
                # FlashAttention may multiply what lies behind a sequence's end by a weight of 0.
                rows.view(torch.uint8).zero_()
        return pool

    def batch(self, entries: Sequence[BatchEntry]) -> Batch:
        pool = entries[0].cache.pool
        device, devices = pool.layout.device, pool.layout.devices
        counts = [len(tokens) for _, tokens, _ in entries]
        batch = replace(
            self._of(entries),
            slots=upload([slot for cache, tokens, _ in entries for slot in cache.slots(len(tokens))], "int64", device),
            parts=self._parts(entries, counts),
        )
        return batch if set(devices) == {device} else _SpreadBatch(batch, devices)

    def _parts(self, entries: Sequence[BatchEntry], counts: list[int]) -> tuple[tuple[Tensor, PagedBatch], ...]:
        few = [i for i, n in enumerate(counts) if n <= FEW_TOKENS]
        if len(few) == len(entries) or len(entries) == 1:
            return ()
        groups = [[i] for i, n in enumerate(counts) if n > FEW_TOKENS] + ([few] if few else [])
        starts = list(accumulate(counts, initial=0))
        device = entries[0].cache.pool.layout.device
        parts = []
        for group in groups:
            rows = [row for i in group for row in range(starts[i], starts[i + 1])]
            parts.append((upload(rows, "int64", device), self._of([entries[i] for i in group])))
        return tuple(parts)

    def _of(self, entries: Sequence[BatchEntry]) -> PagedBatch:
        """The batch of ``entries``, without slots and parts."""
        pool = entries[0].cache.pool
        device = pool.layout.device
        counts = [len(tokens) for _, tokens, _ in entries]
        lengths = [cache.length + n for (cache, _, _), n in zip(entries, counts, strict=True)]
        tables = [cache.pages[: pool.pages_for(length)] for (cache, _, _), length in zip(entries, lengths, strict=True)]
        width = max(len(table) for table in tables)
        starts = [0, *accumulate(counts)]
        groups = groups_worth_sharing(entries)
        return PagedBatch(
            pool=pool,
            slots=torch.empty(0, dtype=torch.long, device=device),
            table=upload([table + [0] * (width - len(table)) for table in tables], "int32", device),
            lengths=upload(lengths, "int32", device),
            starts=upload(starts, "int32", device),
            max_new=max(counts),
            kernel=self.kernel,
            writer=self.writer,
            prefix=SharedPrefix.of(groups, starts, device) if groups else None,
        )


def groups_worth_sharing(entries: Sequence[BatchEntry]) -> list[PrefixGroup]:
    """The groups of ``entries`` that share their first pages; none if the saved reads are not worth another launch."""
    pool = entries[0].cache.pool
    groups = prefix_groups([cache.pages[: cache.length // pool.page_size] for cache, _, _ in entries])
    saved = sum((end - first - 1) * num_pages for first, end, num_pages in groups)
    return groups if saved * pool.page_bytes >= WORTH_SHARING_BYTES * pool.layout.num_layers else []


def gathered_sdpa(query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scaling: float) -> Tensor:
    """Copies each sequence's pages side by side and pads to the longest: slower, but correct on every device."""
    table = batch.table.long()
    num_sequences, width = table.shape
    shape = (num_sequences, width * batch.pool.page_size, *keys.shape[2:])
    # Memory behind a sequence's end may hold NaN, and even a weight of 0 does not make a NaN harmless.
    empty = torch.arange(shape[1], device=query.device) >= batch.lengths[:, None]
    all_keys, all_values = (
        gathered(pages, table, query.dtype).reshape(shape).masked_fill(empty[:, :, None, None], 0).transpose(1, 2)
        for pages in (keys, values)
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
    row = torch.arange(len(query), device=query.device)
    sequence_of = torch.bucketize(row, batch.starts[1:], right=True).clamp_max(num_sequences - 1)
    offset_of = (row - batch.starts[sequence_of]).clamp_max(batch.max_new - 1)
    belongs = (row < batch.starts[-1])[:, None, None]
    return output[sequence_of, :, offset_of].where(belongs, 0)


def recordable(kernel: PagedKernel) -> PagedKernel:
    """Marks a kernel whose launches depend on shapes alone, and whose work on the lengths on the device.

    A graph of it can be replayed over any sequences, and wide tables cost it nothing.
    """
    kernel.recordable = True  # type: ignore[attr-defined]
    return kernel


def kernel_name(kernel: PagedKernel) -> str:
    """What to call ``kernel`` in messages."""
    return str(getattr(kernel, "name", None) or getattr(kernel, "__name__", type(kernel).__name__))
