"""The work plan of the compiled attention over bfloat16 and 8-bit pages: which items of work its threads share.

Every sequence's cache is cut into blocks of positions. One item is one block of one KV head and a few new tokens, of
one sequence or of several that share the block's pages. When all blocks are done, the kernel merges their outputs, as
in flash decoding. It computes the same numbers whether sequences share a block or not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rapid.kernels.cpu import attention_ir, int8_attention_ir, tiled_attention_ir, tiles_ir
from rapid.kernels.cpu.attention_ir import BLOCK, Attention
from rapid.kernels.cpu.int8_attention_ir import Int8Attention
from rapid.kernels.cpu.ir_builder import LANES
from rapid.kernels.cpu.jit import Kernel, available, multiplies_tiles
from rapid.kernels.cpu.tiled_attention_ir import TiledAttention
from rapid.kernels.prefix import PrefixGroup
from rapid.kv_cache.pool import KVLayout, KVPool

BLOCK_PAGES = BLOCK // LANES
_TOKENS = 16  # new tokens in one item of work


class QuerySpan(NamedTuple):
    """One sequence's part of a forward pass: ``new`` tokens from ``row`` of the query on, the last of ``length``."""

    row: int
    new: int
    length: int
    pages: list[int]

    def parts(self) -> Iterator[QuerySpan]:
        """The span in parts of a few tokens; each part sees only the positions up to its own."""
        for start in range(0, self.new, _TOKENS):
            end = min(start + _TOKENS, self.new)
            yield QuerySpan(self.row + start, end - start, self.length - self.new + end, self.pages)


def supports(pool: KVPool) -> bool:
    """Whether the compiled kernel supports this cache."""
    return pool.page_size == LANES and supports_layout(pool.layout)


def supports_layout(layout: KVLayout) -> bool:
    """Whether there is a compiled kernel for pages of as many positions as a register has lanes."""
    return layout.dtype == torch.bfloat16 and layout.head_dim % (2 * LANES) == 0 and available()


class WorkPlan:
    """The items of work of one forward pass over ``num_heads`` query heads, the same in every layer.

    ``words`` are the first of the kernel's arguments, and describe the whole plan.
    """

    NO_WORDS = (0,) * 8

    def __init__(
        self,
        spans: Sequence[QuerySpan],
        groups: Sequence[PrefixGroup],
        layout: KVLayout,
        num_heads: int,
        scaling: float,
    ) -> None:
        """``groups`` are all of the ``spans``; the pages that they share are a multiple of `BLOCK_PAGES`."""
        self._group, self._num_kv_heads = num_heads // layout.num_kv_heads, layout.num_kv_heads
        self._items: list[tuple[int, ...]] = []
        self._merges: list[tuple[int, ...]] = []
        self._pages: list[int] = []
        partial = 0
        for first, end, num_pages in groups:
            partial = self._add(spans[first:end], num_pages, partial)
        self._pages.append(0)  # the kernel loads it, and does not use it, if a block ends with the last page
        self._tables = [torch.tensor(table) for table in (self._items, self._merges, self._pages)]
        most = max(item[2] for item in self._items) * self._group
        scratch_bytes = _writer(layout.stored_dtype).scratch_bytes(most, layout.head_dim)
        self._scratch = torch.empty(torch.get_num_threads(), scratch_bytes, dtype=torch.uint8)
        self._partials = torch.empty(partial, layout.head_dim + 2)
        heads = layout.num_kv_heads, self._group
        self._kernel = attention_kernel(layout.stored_dtype, heads, layout.head_dim, scaling)
        items, merges, pages = self._tables
        self.words = (
            *(items.data_ptr(), len(items), merges.data_ptr(), len(merges)),
            *(pages.data_ptr(), self._scratch.data_ptr(), self._scratch.stride(0), self._partials.data_ptr()),
        )

    def extend(self, length: int) -> bool:
        """Makes of the plan of one sequence's one new token that of its next one, which makes it ``length``.

        Returns False if the plan stays: the token needs another block.
        """
        items = self._tables[0].numpy()
        if _blocks(length) != len(items) // self._num_kv_heads:
            return False
        items[:, 1] = length
        np.minimum(items[:, 4] + BLOCK, length, out=items[:, 5])
        return True

    def _add(self, spans: Sequence[QuerySpan], num_pages: int, partial: int) -> int:
        """Adds the items of sequences that share ``num_pages``. Returns the place behind their partial outputs.

        The partial outputs of a KV head are a table, from ``partial`` on, of blocks times the query rows of all
        ``spans``. A block that several sequences share thus leaves each row's output where the row's own block would.
        """
        row, end = spans[0].row, spans[-1].row + spans[-1].new
        num_rows, num_blocks = (end - row) * self._group, max(_blocks(span.length) for span in spans)
        shared = num_pages // BLOCK_PAGES

        def place(head: int, block: int, at: int) -> int:
            return partial + (head * num_blocks + block) * num_rows + (at - row) * self._group

        def add(at: int, new: int, length: int, pages: int, blocks: range) -> None:
            for head in range(self._num_kv_heads):
                for block in blocks:
                    first, last = block * BLOCK, min((block + 1) * BLOCK, length)
                    self._items.append((at, length, new, head, first, last, pages, place(head, block, at)))

        pages = len(self._pages)
        self._pages.extend(spans[0].pages[:num_pages])
        for start in range(row, end if shared else row, _TOKENS):
            new = min(_TOKENS, end - start)
            add(start, new, num_pages * LANES + new, pages, range(shared))  # every row sees all shared positions
        for span in spans:
            pages = len(self._pages) - num_pages  # where the first page would be, which is never read there
            self._pages.extend(span.pages[num_pages:])
            for at, new, length, _ in span.parts():
                add(at, new, length, pages, range(shared, _blocks(length)))
                for head in range(self._num_kv_heads):
                    self._merges.append((at, new, head, place(head, 0, at), _blocks(length), num_rows))
        return partial + self._num_kv_heads * num_blocks * num_rows

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``query`` [total, heads, d] over ``keys``, ``values`` [KV heads, slots, slot size] to [total, heads·d]."""
        output = query.new_empty(len(query), query.shape[1] * query.shape[2])
        query_bytes, head_bytes = query.stride(0) * query.itemsize, keys.stride(0) * keys.itemsize
        self._kernel(
            *(*self.words, query.data_ptr(), query_bytes, output.data_ptr()),
            *(keys.data_ptr(), values.data_ptr(), head_bytes),
        )
        return output


def _blocks(length: int) -> int:
    return -(-length // BLOCK)


@functools.cache
def attention_kernel(dtype: torch.dtype, heads: tuple[int, int], d: int, scaling: float) -> Kernel:
    """The kernel over pages of ``dtype``; ``heads`` are KV heads, and query heads of each."""
    writer = _writer(dtype)
    name = f"attention-{writer.name}-{heads[0]}x{heads[1]}x{d}-{scaling}"
    sources = (str(module.__file__) for module in (attention_ir, int8_attention_ir, tiled_attention_ir, tiles_ir))
    return Kernel(name, lambda module: writer(module, *heads, d, scaling).write(), *sources)


def _writer(dtype: torch.dtype) -> type[Attention]:
    if dtype == torch.int8:
        return Int8Attention
    return TiledAttention if multiplies_tiles() else Attention
