"""The work plan of the compiled attention over bfloat16 and 8-bit pages: which items of work its threads share.

Every sequence's cache is cut into blocks of positions. One item is one block of one KV head and a few new tokens. When
all blocks are done, the kernel merges their outputs, as in flash decoding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rapid.kernels.cpu import attention_ir, int8_attention_ir
from rapid.kernels.cpu.attention_ir import BLOCK, Attention, Scratch
from rapid.kernels.cpu.int8_attention_ir import Int8Attention, Int8Scratch
from rapid.kernels.cpu.ir_builder import LANES
from rapid.kernels.cpu.jit import Kernel, available
from rapid.kv_cache.pool import KVLayout, KVPool

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

    def __init__(self, spans: Sequence[QuerySpan], layout: KVLayout, num_heads: int, scaling: float) -> None:
        group, d = num_heads // layout.num_kv_heads, layout.head_dim
        items, merges, partial = [], [], 0
        pages: list[int] = []
        for row, new, length, own in (part for span in spans for part in span.parts()):
            for head in range(layout.num_kv_heads):
                merges.append((row, new, head, partial, -(-length // BLOCK)))
                for first in range(0, length, BLOCK):
                    items.append((row, length, new, head, first, min(first + BLOCK, length), len(pages), partial))
                    partial += new * group
            pages.extend(own)
        pages.append(0)  # the kernel loads it, and does not use it, if a block ends with the last page
        self._items, self._merges, self._pages = torch.tensor(items), torch.tensor(merges), torch.tensor(pages)
        most = min(max(span.new for span in spans), _TOKENS) * group
        scratch = Int8Scratch(most, d) if layout.stored_dtype == torch.int8 else Scratch(most, d)
        self._scratch = torch.empty(torch.get_num_threads(), scratch.size, dtype=torch.uint8)
        self._partials = torch.empty(partial, d + 2)
        self._kernel = attention_kernel(layout.stored_dtype, (layout.num_kv_heads, group), d, scaling)
        self.words = (
            *(self._items.data_ptr(), len(self._items), self._merges.data_ptr(), len(self._merges)),
            *(self._pages.data_ptr(), self._scratch.data_ptr(), self._scratch.stride(0), self._partials.data_ptr()),
        )

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``query`` [total, heads, d] over ``keys``, ``values`` [KV heads, slots, slot size] to [total, heads·d]."""
        output = query.new_empty(len(query), query.shape[1] * query.shape[2])
        query_bytes, head_bytes = query.stride(0) * query.itemsize, keys.stride(0) * keys.itemsize
        self._kernel(
            *(*self.words, query.data_ptr(), query_bytes, output.data_ptr()),
            *(keys.data_ptr(), values.data_ptr(), head_bytes),
        )
        return output


@functools.cache
def attention_kernel(dtype: torch.dtype, heads: tuple[int, int], d: int, scaling: float) -> Kernel:
    """The kernel over pages of ``dtype``; ``heads`` are KV heads, and query heads of each."""
    writer, sources = Attention, [attention_ir.__file__]
    if dtype == torch.int8:
        writer, sources = Int8Attention, [*sources, int8_attention_ir.__file__]
    name = f"attention-{str(dtype).removeprefix('torch.')}-{heads[0]}x{heads[1]}x{d}-{scaling}"
    return Kernel(name, lambda module: writer(module, *heads, d, scaling).write(), *sources)
