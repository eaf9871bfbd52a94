"""Triton's part of a layer's operations between its products: `rapid.kernels.cuda.fused` launches these kernels.

They compute in float32 and round once.
"""

from __future__ import annotations

from rapid.kernels.cuda.jit import jit, tl


@jit
def add_norm_row(
    x,  # [rows, size], as more, total and normed
    more,
    weight,  # [size]
    total,
    normed,
    size,
    eps,
    BLOCK: tl.constexpr,  # size, rounded up to a power of two
):
    """Writes x + more of one row, and its RMS norm times the weight."""
    row = tl.program_id(0).to(tl.int64) * size
    n = tl.arange(0, BLOCK)
    inside = n < size
    numbers = tl.load(x + row + n, mask=inside, other=0.0).to(tl.float32)
    numbers += tl.load(more + row + n, mask=inside, other=0.0).to(tl.float32)
    # The norm is that of the sum as the next layer reads it.
    kept = numbers.to(total.dtype.element_ty)
    tl.store(total + row + n, kept, mask=inside)
    numbers = kept.to(tl.float32)
    scale = tl.rsqrt(tl.sum(numbers * numbers, 0) / size + eps)
    numbers *= scale * tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row + n, numbers.to(normed.dtype.element_ty), mask=inside)


@jit
def gate_row(
    x,  # [rows, 2 · size]
    output,  # [rows, size]
    size,
    BLOCK: tl.constexpr,  # numbers of one program
):
    """Writes silu(first half) · second half of a part of one row."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < size
    gate = tl.load(x + row * 2 * size + n, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * size + size + n, mask=inside, other=0.0).to(tl.float32)
    # e to the −|g| is at most 1, where e to the −g would be infinite.
    power = tl.exp(-tl.abs(gate))
    share = tl.where(gate < 0, power, 1.0) / (1.0 + power)
    tl.store(output + row * size + n, (gate * share * up).to(output.dtype.element_ty), mask=inside)


@jit
def rotate_and_write_heads(
    heads,  # [T, NUM_HEADS + 2 · KV_HEADS, D], rows `heads_stride` apart: queries, keys and values
    cos,  # [T, D], rows `angles_stride` apart, as sin
    sin,
    slots,  # int64 [T]
    keys,  # [slots, KV_HEADS, D], as values
    values,
    heads_stride,
    angles_stride,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_HALF: tl.constexpr,  # D / 2, rounded up to a power of two
    HEADS: tl.constexpr,  # of one program
):
    """Rotates some heads of one token: queries where they are; keys, and values as they are, go to the token's slot."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half: tl.constexpr = D // 2
    n = tl.arange(0, BLOCK_HALF)
    is_n = n < half
    inside = (head < NUM_HEADS + 2 * KV_HEADS)[:, None] & is_n[None, :]
    own = heads + token * heads_stride + head[:, None] * D + n[None, :]
    first = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(own + half, mask=inside, other=0.0).to(tl.float32)
    angle = token * angles_stride + n
    cos_first = tl.load(cos + angle, mask=is_n, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin + angle, mask=is_n, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos + angle + half, mask=is_n, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin + angle + half, mask=is_n, other=0.0).to(tl.float32)[None, :]
    turns = (head < NUM_HEADS + KV_HEADS)[:, None]
    low = tl.where(turns, first * cos_first - second * sin_first, first)
    high = tl.where(turns, second * cos_second + first * sin_second, second)

    is_query = inside & (head < NUM_HEADS)[:, None]
    tl.store(own, low.to(heads.dtype.element_ty), mask=is_query)
    tl.store(own + half, high.to(heads.dtype.element_ty), mask=is_query)
    slot = tl.load(slots + token) * (KV_HEADS * D)
    key = keys + slot + (head[:, None] - NUM_HEADS) * D + n[None, :]
    is_key = inside & turns & (head >= NUM_HEADS)[:, None]
    tl.store(key, low.to(keys.dtype.element_ty), mask=is_key)
    tl.store(key + half, high.to(keys.dtype.element_ty), mask=is_key)
    value = values + slot + (head[:, None] - NUM_HEADS - KV_HEADS) * D + n[None, :]
    is_value = inside & (head >= NUM_HEADS + KV_HEADS)[:, None]
    tl.store(value, low.to(values.dtype.element_ty), mask=is_value)
    tl.store(value + half, high.to(values.dtype.element_ty), mask=is_value)
