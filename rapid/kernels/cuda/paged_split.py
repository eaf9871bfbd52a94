"""Attention over pages for few new tokens (a decode or draft step, a verification), in two Triton kernels.

One sequence with one new token keeps only its KV heads busy, eight of a device's hundred processors. So the positions
of a sequence are split into parts. For every sequence, KV head and part, one program of the first kernel reads the keys
and values of its part once, for all rows: the new tokens times the query heads that share the KV head. The second
kernel combines the parts of each row.

Sequences may have different numbers of new tokens. Everything that changes from pass to pass is a tensor on the device,
and the number of parts depends on shapes alone, so that a CUDA graph can hold both kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
    """
    from rapid.kernels.cuda.split_kernels import attend_part, combine_parts

    total, heads, d = query.shape
    _, page_size, kv_heads, _ = keys.shape
    num_sequences, width = table.shape
    if query.stride()[1:] != (d, 1):
        query = query.contiguous()
    assert keys.is_contiguous() and values.is_contiguous() and table.is_contiguous()
    made = cut(
        num_sequences,
        (heads, kv_heads),
        d,
        query.dtype,
        max_new=max_new,
        width=width,
        page_size=page_size,
        num_sms=num_sms,
    )
    # The second kernel writes every row; the first leaves out those that belong to no sequence.
    output = query.new_empty((total, heads, d)) if made.parts > 1 else query.new_zeros((total, heads, d))
    partial = output if made.parts == 1 else query.new_empty((total, heads, made.parts, d), dtype=torch.float32)
    partial_lse = query.new_empty((total, heads, made.parts), dtype=torch.float32)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        attend_part[num_sequences, kv_heads * made.row_blocks, made.parts](
            query,
            keys,
            values,
            table,
            table if page_positions is None else page_positions,
            lengths if pages_used is None else pages_used,
            lengths,
            starts,
            partial_lse if key_scales is None else key_scales,
            partial_lse if value_scales is None else value_scales,
            partial,
            partial_lse,
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
            num_warps=made.num_warps,
            num_stages=NUM_STAGES,
        )
        if made.parts > 1:
            combine_parts[(total * heads,)](
                partial,
                partial_lse,
                starts,
                output,
                num_sequences,
                made.parts,
                HEADS=heads,
                D=d,
                BLOCK_D=made.block_d,
                BLOCK_PARTS=_power_of_two(made.parts),
            )
    return output


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
