"""Triton's part of attention over few rows: one program reads a part of one sequence's keys and values.

`rapid.kernels.cuda.paged_split` launches these kernels and explains the arguments.
"""

from __future__ import annotations

from rapid.kernels.cuda.jit import jit, tl


@jit
def attend_part(
    query,  # [T, HEADS, D], rows `query_stride` apart
    keys,  # [pages, PAGE, KV_HEADS, D], as values
    values,
    table,  # int32 [S, table_width], as page_positions
    page_positions,
    pages_used,  # int32 [S]
    lengths,  # int32 [S]
    starts,  # int32 [S + 1]
    shared_pages,  # int32 [S]
    table_rows,  # int32 [S]
    key_scales,  # float32 [KV_HEADS], as value_scales
    value_scales,
    partial,  # float32 [T, HEADS, all_parts, D]; with one part it is the output, in the output's type
    partial_lse,  # float32 [T, HEADS, all_parts]
    first_part,  # of this launch, among all
    all_parts,
    scaling,
    sinks,
    window,
    query_stride,
    table_width,
    PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of one KV head
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D, rounded up to a power of two
    ROWS: tl.constexpr,  # of one program: new tokens × GROUP
    BLOCK: tl.constexpr,  # positions read at once; it divides PAGE
    WINDOWED: tl.constexpr,
    CHOSEN: tl.constexpr,
    SCALED: tl.constexpr,
    PREFIX: tl.constexpr,
    REST: tl.constexpr,
):
    """Softmax over one part of a sequence's positions, for rows that are (new token, query head of the KV head).

    With PREFIX a "sequence" is a group of sequences with neighbouring rows, all of which see the first `shared_pages`
    of the table's row `table_rows`, and nothing else is read. With REST these pages of each sequence are left out.
    """
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1) % KV_HEADS
    row_block = tl.program_id(1) // KV_HEADS
    part = tl.program_id(2)
    parts = tl.num_programs(2)

    start = tl.load(starts + sequence)
    num_new = tl.load(starts + sequence + 1) - start
    if row_block * ROWS >= num_new * GROUP:
        return
    table_row = sequence
    if PREFIX:
        length = tl.load(shared_pages + sequence) * PAGE
        first_new = length
        table_row = tl.load(table_rows + sequence)
    else:
        length = tl.load(lengths + sequence)
        first_new = length - num_new

    row = row_block * ROWS + tl.arange(0, ROWS)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = token < num_new
    position = first_new + token
    dim = tl.arange(0, BLOCK_D)
    is_dim = dim < D
    at = (start + token).to(tl.int64)
    if PREFIX and length == 0:  # a sequence without a group
        place = (at * (KV_HEADS * GROUP) + head) * all_parts + first_part + part
        tl.store(partial_lse + place, tl.full([ROWS], -float("inf"), tl.float32), mask=is_row)
        return
    q = tl.load(
        query + at[:, None] * query_stride + head[:, None] * D + dim[None, :],
        mask=is_row[:, None] & is_dim[None, :],
        other=0.0,
    )
    # exp2 is the instruction that the device has; the scores are scaled for it.
    scale = scaling * 1.4426950408889634
    if SCALED:
        scale *= tl.load(key_scales + kv_head)

    blocks_per_page = PAGE // BLOCK
    skipped_from = 0
    skipped = 0
    if CHOSEN:
        num_blocks = tl.load(pages_used + sequence) * blocks_per_page
    else:
        num_blocks = tl.cdiv(length, BLOCK)
        if WINDOWED:
            # No row sees what lies between the sinks and the window of the first new token.
            window_block = tl.maximum(first_new - window + 1, 0) // BLOCK
            skipped_from = tl.minimum(tl.cdiv(sinks, BLOCK), window_block)
            skipped = window_block - skipped_from
            num_blocks -= skipped
        if REST:
            skipped = tl.load(shared_pages + sequence) * blocks_per_page
            num_blocks -= skipped

    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, BLOCK_D], tl.float32)
    n = tl.arange(0, BLOCK)
    per_part = tl.cdiv(num_blocks, parts)
    for i in range(part * per_part, tl.minimum((part + 1) * per_part, num_blocks)):
        block = i
        if WINDOWED or REST:
            block = tl.where(i < skipped_from, i, i + skipped)
        entry = table_row * table_width + block // blocks_per_page
        offset = (block % blocks_per_page) * BLOCK + n
        slot = tl.load(table + entry).to(tl.int64) * PAGE + offset
        if CHOSEN:
            key_position = tl.load(page_positions + entry) * PAGE + offset
        else:
            key_position = (block // blocks_per_page) * PAGE + offset
        # Slots that nothing was written to may hold NaN, which a weight of 0 would not make harmless.
        written = key_position < length
        k = tl.load(
            keys + (slot[None, :] * KV_HEADS + kv_head) * D + dim[:, None],
            mask=written[None, :] & is_dim[:, None],
            other=0.0,
        )
        seen = written[None, :] & (key_position[None, :] <= position[:, None])
        if WINDOWED:
            seen &= (key_position[None, :] < sinks) | (key_position[None, :] > position[:, None] - window)
        # In float32 three products of 19-bit numbers come close to one of full precision, and use the tensor cores.
        scores = tl.dot(q, k.to(q.dtype), input_precision="tf32x3") * scale
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(highest - base)
        v = tl.load(
            values + (slot[:, None] * KV_HEADS + kv_head) * D + dim[None, :],
            mask=written[:, None] & is_dim[None, :],
            other=0.0,
        )
        output = output * kept[:, None] + tl.dot(weights.to(q.dtype), v.to(q.dtype), input_precision="tf32x3")
        total = total * kept + tl.sum(weights, 1)
        highest = higher

    if SCALED:
        output *= tl.load(value_scales + kv_head)
    nonzero = tl.where(total == 0.0, 1.0, total)
    # Here and not above: what is kept over the loop takes registers.
    place = ((start + token).to(tl.int64) * (KV_HEADS * GROUP) + head) * all_parts + first_part + part
    tl.store(
        partial + place[:, None] * D + dim[None, :],
        (output / nonzero[:, None]).to(partial.dtype.element_ty),
        mask=is_row[:, None] & is_dim[None, :],
    )
    tl.store(partial_lse + place, tl.where(total == 0.0, -float("inf"), highest + tl.log2(nonzero)), mask=is_row)


@jit
def combine_parts(
    partial,
    partial_lse,
    starts,  # int32 [S + 1]
    output,  # [T, HEADS, D]
    num_sequences,
    parts,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,  # parts, rounded up to a power of two
):
    """Weighs one row's parts by their sums of exponentials. A row is one query head of one token.

    The rows know nothing of sequences, so that any number of them, of any lengths, is combined alike. A row behind the
    last sequence has no parts, and gets zeros.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_PARTS)
    dim = tl.arange(0, BLOCK_D)
    is_part = (part < parts) & (row < tl.load(starts + num_sequences) * HEADS)
    lse = tl.load(partial_lse + row * parts + part, mask=is_part, other=-float("inf"))
    highest = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(highest == -float("inf"), 0.0, highest))
    total = tl.sum(weights, 0)
    rows = tl.load(
        partial + (row * parts + part[:, None]) * D + dim[None, :],
        mask=(lse[:, None] > -float("inf")) & (dim[None, :] < D),  # others may not be written
        other=0.0,
    )
    mean = tl.sum(rows * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(output + row * D + dim, mean.to(output.dtype.element_ty), mask=dim < D)
