"""Triton's part of products with low-bit weights: `rapid.kernels.cuda.low_bit` packs them and launches these kernels.

Packed weights are int8 [panels, blocks, PANEL, BLOCK]: a panel is PANEL outputs, and one program reads a contiguous
piece of it. In eight bits a block is BLOCK inputs. In four bits it is two groups of BLOCK inputs: a byte has a code of
the first group in its lower half, one of the second in its upper, and its highest bit is flipped. Scales are float32
[panels · PANEL], or in four bits int32 [panels, groups, PANEL]: an offset and, in the lower half, a scale, in bfloat16.

Every program multiplies ROWS rows of x. That is at most 32, so that one instruction of the tensor cores serves any
number of rows, and a row's sums do not depend on how many there are.
"""

from __future__ import annotations

from rapid.kernels.cuda.jit import jit, tl


@jit
def _eight_bits(codes, SCHEME: tl.constexpr, DTYPE: tl.constexpr):
    """The weights of a block [BLOCK, PANEL] in eight bits, without their scale."""
    if SCHEME == "int8":
        numbers = codes.to(DTYPE)
    else:
        # A float8_e4m3fn has float32's layout with fewer bits, and its exponents count from elsewhere. Devices before
        # sm_89 have no instruction for it. The mask is 0x87F00000.
        bits = (codes.to(tl.int32) << 20) & -2014314496
        numbers = (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(DTYPE)  # 2^120
    return numbers


@jit
def _four_bits(codes, pairs, PANEL: tl.constexpr, DTYPE: tl.constexpr):
    """The weights of a block's two groups, each [BLOCK, PANEL]; ``pairs`` points at their scales and offsets."""
    # Masks and shifts cost an instruction for each code, arithmetic in 16 bits half of one. A byte is 16 · upper +
    # lower − 128, and 16 bits hold all of these numbers exactly.
    lower = (codes & 15).to(DTYPE)
    upper = codes.to(DTYPE) - lower + 128.0
    n = tl.arange(0, PANEL)
    return _scaled(lower, tl.load(pairs + n), 1.0), _scaled(upper, tl.load(pairs + PANEL + n), 0.0625)


@jit
def _scaled(numbers, pair, STEP: tl.constexpr):
    scales = ((pair << 16).to(tl.float32, bitcast=True) * STEP).to(numbers.dtype)
    offsets = (pair & -65536).to(tl.float32, bitcast=True).to(numbers.dtype)
    shape: tl.constexpr = numbers.shape
    return tl.fma(numbers, tl.broadcast_to(scales[None, :], shape), tl.broadcast_to(offsets[None, :], shape))


@jit
def multiply(
    x,  # [num_rows, num_inputs], rows `x_stride` apart
    packed,
    scales,
    bias,  # [num_outputs]
    output,  # [num_rows, num_outputs]; with several parts float32 [parts, num_rows, num_outputs]
    num_rows,
    num_inputs,
    num_outputs,
    x_stride,
    num_blocks,
    blocks_per_part,
    SCHEME: tl.constexpr,  # int4, int8 or fp8
    ROWS: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_BIAS: tl.constexpr,
):
    """Multiplies some rows with a panel of weights, over one part of the inputs."""
    panel = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row[:, None] < num_rows
    n = tl.arange(0, PANEL)
    k = tl.arange(0, BLOCK)
    inputs = x + row[:, None].to(tl.int64) * x_stride + k[None, :]
    weights = packed + panel * num_blocks * (BLOCK * PANEL) + k[:, None] + n[None, :] * BLOCK
    sums = tl.zeros([ROWS, PANEL], tl.float32)
    start = tl.program_id(2) * blocks_per_part
    for block in range(start, tl.minimum(start + blocks_per_part, num_blocks)):
        codes = tl.load(weights + block * (BLOCK * PANEL))
        # In float32 three products of 19-bit numbers come close to one of full precision.
        if SCHEME == "int4":
            pairs = scales + (panel * num_blocks + block) * (2 * PANEL)
            first, second = _four_bits(codes, pairs, PANEL, x.dtype.element_ty)
            at = block * (2 * BLOCK)
            left = tl.load(inputs + at, mask=is_row & (at + k[None, :] < num_inputs), other=0.0)
            sums = tl.dot(left, first, sums, input_precision="tf32x3")
            at += BLOCK
            left = tl.load(inputs + at, mask=is_row & (at + k[None, :] < num_inputs), other=0.0)
            sums = tl.dot(left, second, sums, input_precision="tf32x3")
        else:
            at = block * BLOCK
            left = tl.load(inputs + at, mask=is_row & (at + k[None, :] < num_inputs), other=0.0)
            weight = _eight_bits(codes, SCHEME, x.dtype.element_ty)
            sums = tl.dot(left, weight, sums, input_precision="tf32x3")
    column = panel * PANEL + n
    if SCHEME != "int4":
        sums *= tl.load(scales + column)[None, :]
    if WITH_BIAS:
        sums += tl.load(bias + column, mask=column < num_outputs, other=0.0).to(tl.float32)[None, :]
    place = (part * num_rows + row[:, None]) * num_outputs + column[None, :]
    tl.store(output + place, sums.to(output.dtype.element_ty), mask=is_row & (column[None, :] < num_outputs))


@jit
def add_parts(
    partial,  # float32 [parts, num_rows, num_outputs]
    bias,
    output,  # [num_rows, num_outputs]
    parts,
    num_rows,
    num_outputs,
    COLUMNS: tl.constexpr,
    WITH_BIAS: tl.constexpr,
):
    """Adds the parts of each sum, always from the first to the last."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < num_outputs
    sums = tl.zeros([COLUMNS], tl.float32)
    for part in range(parts):
        sums += tl.load(partial + (part * num_rows + row) * num_outputs + column, mask=is_column, other=0.0)
    if WITH_BIAS:
        sums += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(output + row * num_outputs + column, sums.to(output.dtype.element_ty), mask=is_column)


@jit
def unpack(
    packed,
    scales,
    weight,  # [num_outputs, num_inputs]
    num_inputs,
    num_outputs,
    num_blocks,
    SCHEME: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes one block of one panel as plain weights."""
    block = tl.program_id(0)
    panel = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, PANEL)
    k = tl.arange(0, BLOCK)
    codes = tl.load(packed + (panel * num_blocks + block) * (BLOCK * PANEL) + k[:, None] + n[None, :] * BLOCK)
    column = panel * PANEL + n
    is_column = column[None, :] < num_outputs
    place = weight + column[None, :] * num_inputs
    if SCHEME == "int4":
        pairs = scales + (panel * num_blocks + block) * (2 * PANEL)
        first, second = _four_bits(codes, pairs, PANEL, weight.dtype.element_ty)
        at = block * (2 * BLOCK) + k[:, None]
        tl.store(place + at, first, mask=is_column & (at < num_inputs))
        at += BLOCK
        tl.store(place + at, second, mask=is_column & (at < num_inputs))
    else:
        at = block * BLOCK + k[:, None]
        numbers = _eight_bits(codes, SCHEME, tl.float32) * tl.load(scales + column)[None, :]
        tl.store(place + at, numbers.to(weight.dtype.element_ty), mask=is_column & (at < num_inputs))
