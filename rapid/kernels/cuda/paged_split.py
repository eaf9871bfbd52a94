"""Attention over pages for few new tokens (a decode or draft step, a verification), in two Triton kernels.

One sequence with one new token keeps only its KV heads busy, eight of a device's hundred processors. So the positions
of a sequence are split into parts. For every sequence, KV head and part, one program of the first kernel reads the keys
and values of its part once, for all rows: the new tokens times the query heads that share the KV head. The second
kernel combines the parts of each row.

Pages that a group of sequences shares are read once: the first kernel is launched once more, for all rows of each group
over the group's pages. The sequences' own programs begin behind these.

Sequences may have different numbers of new tokens. Everything that changes from pass to pass is a tensor on the device,
and the number of parts depends on shapes alone, so that a CUDA graph can hold both kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rapid.kernels.prefix import PrefixGroup
from rapid.kernels.transfer import upload

MAX_PARTS = 128
NUM_STAGES = 3  # the page of the next block is read ahead; more stages change nothing, or need more shared memory

# How many programs run beside each other on a processor, by their rows: as many as its registers hold
# (benchmarks/results/triton_attention.json). Together they keep enough reads on their way to memory.
PROGRAMS_PER_SM = {16: 4, 32: 3, 64: 2, 128: 1}


@dataclass(frozen=True)
class Cut:
    """How a launch is cut into programs.

    A program has ``rows`` rows and reads ``block`` positions at once. The rows of one sequence and KV head are
    ``row_blocks`` programs, each of which reads the keys again. Positions are split into ``parts``.
    """

    rows: int
    row_blocks: int
    block: int
    parts: int
    block_d: int  # the head size, rounded up to a power of two

    @property
    def num_warps(self) -> int:
        return 8 if self.rows * self.block_d >= 128 * 128 else 4


def cut(
    num_sequences: int,
    heads: tuple[int, int],
    d: int,
    dtype: torch.dtype,
    *,
    max_new: int,
    width: int,
    page_size: int,
    num_sms: int,
) -> Cut:
    """The cut of a launch for ``num_sequences`` sequences of at most ``max_new`` new tokens and ``width`` pages.

    ``heads`` are (query heads, KV heads) of size ``d``. The cut depends on shapes alone, so that a graph can hold it.
    There are as many parts as fill ``num_sms`` processors, and no more than blocks.

    Raises:
        ValueError: a program's numbers would not fit into registers.
    """
    block_d, group = max(16, _power_of_two(d)), heads[0] // heads[1]
    if block_d * dtype.itemsize > 512:
        raise ValueError(f"heads of {d} numbers in {dtype} are too large")
    # Larger blocks and more rows spill registers.
    block = 64 if block_d * dtype.itemsize <= 256 and dtype.itemsize == 2 else 32
    most_rows = 128 if block == 64 else 64 if dtype.itemsize == 2 else 32
    rows = min(most_rows, max(16, _power_of_two(max_new * group)))
    row_blocks = -(-max_new * group // rows)
    block = min(block, page_size)
    programs = num_sequences * heads[1] * row_blocks
    parts = min(PROGRAMS_PER_SM[rows] * num_sms // programs, width * page_size // block, MAX_PARTS)
    return Cut(rows, row_blocks, block, max(1, parts), block_d)


@dataclass(frozen=True)
class SharedPrefix:
    """The sequences in groups of neighbours that share their first pages. Every tensor is int32 on the device.

    ``starts`` [S + 1]: where each group's new tokens begin; groups that are not used begin, and end, at the last.
    ``pages`` [S]: how many pages each group shares, 0 for a sequence alone. ``table_rows`` [S]: a sequence of each
    group. ``skipped`` [S]: the shared pages of each sequence.
    """

    starts: Tensor
    pages: Tensor
    table_rows: Tensor
    skipped: Tensor

    @classmethod
    def of(cls, groups: Sequence[PrefixGroup], starts: Sequence[int], device: torch.device) -> SharedPrefix:
        """On ``device``; ``starts`` [S + 1] are where each sequence's new tokens begin."""
        return cls(*(upload(numbers, "int32", device) for numbers in prefix_numbers(groups, starts)))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.starts, self.pages, self.table_rows, self.skipped

    def to(self, device: torch.device) -> SharedPrefix:
        return SharedPrefix(*(tensor.to(device) for tensor in self.tensors()))


def prefix_numbers(
    groups: Sequence[PrefixGroup], starts: Sequence[int]
) -> tuple[list[int], list[int], list[int], list[int]]:
    """What a `SharedPrefix` has on the device: ``starts`` [S + 1] are where each sequence's new tokens begin.

    The groups may be of fewer than S sequences, if the others have no tokens.
    """
    num_sequences = len(starts) - 1
    unused = num_sequences - len(groups)
    skipped = [pages for first, end, pages in groups for _ in range(first, end)]
    return (
        [starts[first] for first, _, _ in groups] + [starts[-1]] * (unused + 1),
        [pages for _, _, pages in groups] + [0] * unused,
        [first for first, _, _ in groups] + [0] * unused,
        skipped + [0] * (num_sequences - len(skipped)),
    )


def split_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    table: Tensor,
    lengths: Tensor,
    starts: Tensor,
    max_new: int,
    scaling: float,
    num_sms: int,
    sinks: int = 0,
    window: int | None = None,
    page_positions: Tensor | None = None,
    pages_used: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    prefix: SharedPrefix | None = None,
) -> Tensor:
    """Causal attention of T new tokens in S sequences over their pages: [T, heads, d] in ``query``'s type.

    Args:
        query: [T, heads, d]. Query head h reads KV head h // (heads / KV heads).
        keys: [pages, page size, KV heads, d], the new tokens' included, as ``values``; float8_e4m3fn with scales.
        table: int32 [S, P], each sequence's pages in order.
        lengths: int32 [S], tokens in each sequence, the new ones included.
        starts: int32 [S + 1], where in ``query`` each sequence's new tokens begin. Tokens behind the last start get
            zeros.
        max_new: no sequence has more new tokens.
        scaling: factor of the scores.
        num_sms: processors of the device.
        sinks, window: with ``window`` a token at position i sees positions below ``sinks`` and those above
            i − ``window``, itself included.
        page_positions: int32 [S, P]. ``table`` then holds chosen pages, and entry (s, j) is page number
            ``page_positions[s, j]`` of sequence s. A token that sees none of them gets zeros.
        pages_used: int32 [S], how many entries of each row of ``table`` are chosen.
        key_scales: float32 [KV heads], factors of the stored keys, as ``value_scales``; both or neither.
        prefix: which sequences share their first pages, which are then read once. Their tokens see all of them, so
            there is neither a window nor chosen pages.
    """
    from rapid.kernels.cuda.split_kernels import attend_part, combine_parts

    total, heads, d = query.shape
    _, page_size, kv_heads, _ = keys.shape
    num_sequences, width = table.shape
    if query.stride()[1:] != (d, 1):
        query = query.contiguous()
    assert keys.is_contiguous() and values.is_contiguous() and table.is_contiguous()
    assert prefix is None or (window is None and page_positions is None)
    cut_of = functools.partial(
        cut, heads=(heads, kv_heads), d=d, dtype=query.dtype, width=width, page_size=page_size, num_sms=num_sms
    )
    made = cut_of(num_sequences, max_new=max_new)
    # Most groups may be empty, so the parts are as many as one group needs, which may have all rows.
    shared = None if prefix is None else cut_of(1, max_new=total)
    parts = made.parts + (shared.parts if shared else 0)
    # The second kernel writes every row; the first leaves out those that belong to no sequence.
    output = query.new_empty((total, heads, d)) if parts > 1 else query.new_zeros((total, heads, d))
    partial = output if parts == 1 else query.new_empty((total, heads, parts, d), dtype=torch.float32)
    partial_lse = query.new_empty((total, heads, parts), dtype=torch.float32)

    def attend(made: Cut, first_part: int, starts: Tensor, shared_pages: Tensor, *, is_prefix: bool) -> None:
        attend_part[num_sequences, kv_heads * made.row_blocks, made.parts](
            query,
            keys,
            values,
            table,
            table if page_positions is None else page_positions,
            lengths if pages_used is None else pages_used,
            lengths,
            starts,
            shared_pages,
            lengths if prefix is None else prefix.table_rows,
            partial_lse if key_scales is None else key_scales,
            partial_lse if value_scales is None else value_scales,
            partial,
            partial_lse,
            first_part,
            parts,
            scaling,
            sinks,
            0 if window is None else window,
            query.stride(0),
            width,
            PAGE=page_size,
            KV_HEADS=kv_heads,
            GROUP=heads // kv_heads,
            D=d,
            BLOCK_D=made.block_d,
            ROWS=made.rows,
            BLOCK=made.block,
            WINDOWED=window is not None,
            CHOSEN=page_positions is not None,
            SCALED=key_scales is not None,
            PREFIX=is_prefix,
            REST=prefix is not None and not is_prefix,
            num_warps=made.num_warps,
            num_stages=NUM_STAGES,
        )

    with torch.cuda.device_of(query):  # Triton launches on the current device
        attend(made, 0, starts, lengths if prefix is None else prefix.skipped, is_prefix=False)
        if prefix is not None and shared is not None:
            attend(shared, made.parts, prefix.starts, prefix.pages, is_prefix=True)
        if parts > 1:
            combine_parts[(total * heads,)](
                partial,
                partial_lse,
                starts,
                output,
                num_sequences,
                parts,
                HEADS=heads,
                D=d,
                BLOCK_D=made.block_d,
                BLOCK_PARTS=_power_of_two(parts),
            )
    return output


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
