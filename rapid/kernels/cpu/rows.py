"""The operations of a decoder layer on single rows, one kernel each: norm, rotation, gate, storing.

PyTorch needs several operators for each operation: hundreds a decode step, and over few rows most of the time is their
overhead. A kernel computes everything in float32 and rounds once. Each function falls back to PyTorch's operators for
devices and sizes without a kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rapid.kernels.cpu import int8_attention_ir
from rapid.kernels.cpu.int8_attention_ir import write_storing
from rapid.kernels.cpu.ir_builder import LANES, KernelBuilder, constant, every_float, floats, kind
from rapid.kernels.cpu.jit import COUNTERS, Kernel, available

MANY = 16  # rows; from here on waking the other threads pays
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def supports(x: Tensor, size: int) -> bool:
    """Whether there are kernels for rows of ``size`` numbers with the device and dtype of ``x``."""
    return x.device.type == "cpu" and x.dtype in _NAMES and size % LANES == 0 and available()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + ε) · weight over the last dimension."""
    size = x.shape[-1]
    if not supports(x, size):
        return F.rms_norm(x, (size,), weight, eps)
    x = x.contiguous()
    output = torch.empty_like(x)
    _run(norm_kernel(x.dtype, size, eps), x.numel() // size, x, output, weight)
    return output


def gated(x: Tensor) -> Tensor:
    """silu(first half) · second half of every row [rows, 2 · size]."""
    size = x.shape[1] // 2
    if not supports(x, size):
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)
    output = x.new_empty(len(x), size)
    _run(gate_kernel(x.dtype, size), len(x), x.contiguous(), output)
    return output


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, num_rotated: int) -> Tensor:
    """The first ``num_rotated`` of ``heads`` [rows, heads, d], rotated by the angles of ``cos``, ``sin`` [rows, d].

    The function may overwrite ``heads``.
    """
    rows, num_heads, d = heads.shape
    if not supports(heads, d // 2):
        turning = heads[:, :num_rotated]
        first, second = turning.chunk(2, -1)
        turned = turning * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)
        return torch.cat((turned, heads[:, num_rotated:]), 1)
    heads = heads.contiguous()
    _run(rotation_kernel(heads.dtype, d, num_rotated, num_heads), rows, heads, cos, sin)
    return heads


def store(new: Tensor, slots: Tensor, cache: Tensor) -> None:
    """Writes ``new`` [rows, KV heads, d] into ``cache`` [KV heads, slots, d] at ``slots`` [rows]."""
    rows, num_heads, d = new.shape
    if not supports(new, d) or new.stride(1) != d:
        cache.index_copy_(1, slots, new.transpose(0, 1))
        return
    _run(storing_kernel(new.dtype, d, num_heads), rows, new, new.stride(0), slots, cache, cache.stride(0))


def store_int8(new: Tensor, slots: Tensor, cache: Tensor, *, is_key: bool) -> None:
    """Writes ``new`` [rows, KV heads, d] in bfloat16 into the 8-bit pages ``cache`` at ``slots`` [rows]."""
    rows, num_heads, d = new.shape
    if new.stride(1) != d:
        new = new.contiguous()
    _run(int8_storing_kernel(d, num_heads, is_key), rows, new, new.stride(0), slots, cache, cache.stride(0))


def _run(kernel: Kernel, rows: int, *arguments: Tensor | int) -> None:
    run = kernel if rows >= MANY else kernel.alone
    run(rows, *(a if isinstance(a, int) else a.data_ptr() for a in arguments))


def _per_row(name: str, write: Callable[..., None], num_arguments: int, *sources: str) -> Kernel:
    """A kernel that calls ``write`` with the row's number and the arguments, once for each row."""

    def whole(module: Any) -> None:
        code = KernelBuilder(module, "kernel", 1)
        (data,) = code.parameters
        rows, *arguments = (code.word(data, COUNTERS + i) for i in range(1 + num_arguments))
        with code.items(data, rows) as row:
            write(code, row, *arguments)
        code.finish()

    return Kernel(name, whole, __file__, *sources)


class _Rows:
    """Loads and stores sixteen numbers of ``dtype``; the kernels compute with them in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.bytes = dtype.itemsize
        self._kind = kind(_NAMES[dtype], LANES)

    def load(self, code: KernelBuilder, place: Any) -> Any:
        numbers = code.load(self._kind, place)
        return numbers if self.bytes == 4 else code.builder.fpext(numbers, floats())

    def store(self, code: KernelBuilder, numbers: Any, place: Any) -> None:
        code.store(numbers if self.bytes == 4 else code.rounded(numbers), place)


@functools.cache
def norm_kernel(dtype: torch.dtype, size: int, eps: float) -> Kernel:
    rows = _Rows(dtype)

    def write(code: KernelBuilder, row: Any, x: Any, output: Any, weight: Any) -> None:
        offset = code.times(row, size * rows.bytes)
        squares = code.variable(every_float(0.0))
        with code.loop(0, size * rows.bytes, LANES * rows.bytes) as i:
            numbers = rows.load(code, code.plus(x, offset, i))
            squares.value = code.fma(numbers, numbers, squares.value)
        number = kind("f32")
        mean = code.builder.fdiv(code.sum(squares.value), constant(number, float(size)))
        root = code.intrinsic("llvm.sqrt.f32", number, code.builder.fadd(mean, constant(number, eps)))
        scale = code.splat(code.builder.fdiv(constant(number, 1.0), root))
        with code.loop(0, size * rows.bytes, LANES * rows.bytes) as i:
            numbers = code.builder.fmul(rows.load(code, code.plus(x, offset, i)), scale)
            numbers = code.builder.fmul(numbers, rows.load(code, code.plus(weight, i)))
            rows.store(code, numbers, code.plus(output, offset, i))

    return _per_row(f"norm-{_NAMES[dtype]}-{size}-{eps}", write, 3)


@functools.cache
def gate_kernel(dtype: torch.dtype, size: int) -> Kernel:
    rows = _Rows(dtype)

    def write(code: KernelBuilder, row: Any, x: Any, output: Any) -> None:
        place = code.plus(x, code.times(row, 2 * size * rows.bytes))
        target = code.plus(output, code.times(row, size * rows.bytes))
        one, zero = every_float(1.0), every_float(0.0)
        with code.loop(0, size * rows.bytes, LANES * rows.bytes) as i:
            gate = rows.load(code, code.plus(place, i))
            up = rows.load(code, code.plus(place, i, size * rows.bytes))
            # 1 / (1 + e⁻ᵍ), computed from e to the −|g|, which is at most 1.
            power = code.exp(code.builder.fneg(code.intrinsic("llvm.fabs.v16f32", floats(), gate)))
            share = code.builder.select(code.builder.fcmp_ordered("<", gate, zero), power, one)
            share = code.builder.fdiv(share, code.builder.fadd(one, power))
            rows.store(code, code.builder.fmul(code.builder.fmul(gate, share), up), code.plus(target, i))

    return _per_row(f"gate-{_NAMES[dtype]}-{size}", write, 2)


@functools.cache
def sum_kernel(dtype: torch.dtype, size: int) -> Kernel:
    """(x, y, bytes from a row of y to the next): adds every row of y to that of x."""
    rows = _Rows(dtype)

    def write(code: KernelBuilder, row: Any, x: Any, y: Any, y_bytes: Any) -> None:
        x, y = code.plus(x, code.times(row, size * rows.bytes)), code.plus(y, code.times(row, y_bytes))
        with code.loop(0, size * rows.bytes, LANES * rows.bytes) as i:
            place = code.plus(x, i)
            rows.store(code, code.builder.fadd(rows.load(code, place), rows.load(code, code.plus(y, i))), place)

    return _per_row(f"sum-{_NAMES[dtype]}-{size}", write, 3)


@functools.cache
def rotation_kernel(dtype: torch.dtype, d: int, num_rotated: int, num_heads: int) -> Kernel:
    rows = _Rows(dtype)
    half = d // 2 * rows.bytes

    def write(code: KernelBuilder, row: Any, heads: Any, cos: Any, sin: Any) -> None:
        own = code.plus(heads, code.times(row, num_heads * d * rows.bytes))
        angles = code.times(row, d * rows.bytes)
        for i in range(0, half, LANES * rows.bytes):
            # Both halves turn by the same angles.
            c, s = (rows.load(code, code.plus(table, angles, i)) for table in (cos, sin))
            with code.loop(0, num_rotated) as head:
                place = code.plus(own, code.times(head, d * rows.bytes), i)
                a, b = rows.load(code, place), rows.load(code, code.plus(place, half))
                turned = code.fma(a, c, code.builder.fneg(code.builder.fmul(b, s)))
                rows.store(code, turned, place)
                rows.store(code, code.fma(b, c, code.builder.fmul(a, s)), code.plus(place, half))

    return _per_row(f"rotation-{_NAMES[dtype]}-{d}-{num_rotated}of{num_heads}", write, 3)


@functools.cache
def storing_kernel(dtype: torch.dtype, d: int, num_heads: int) -> Kernel:
    size = dtype.itemsize
    part = kind("i16", LANES * size // 2)

    def write(
        code: KernelBuilder, row: Any, new: Any, row_stride: Any, slots: Any, cache: Any, head_stride: Any
    ) -> None:
        slot = code.word(code.plus(slots, code.times(row, 8)))
        own = code.plus(new, code.times(row, row_stride, size))
        for head in range(num_heads):
            target = code.plus(cache, code.times(code.plus(code.times(head_stride, head), code.times(slot, d)), size))
            for i in range(0, d * size, LANES * size):
                code.store(code.load(part, code.plus(own, head * d * size + i)), code.plus(target, i))

    return _per_row(f"storing-{_NAMES[dtype]}-{num_heads}x{d}", write, 5)


@functools.cache
def int8_storing_kernel(d: int, num_heads: int, is_key: bool) -> Kernel:
    """`storing_kernel` from bfloat16 into 8-bit pages, whose keys and values lie in different orders."""

    def write(
        code: KernelBuilder, row: Any, new: Any, row_stride: Any, slots: Any, cache: Any, head_stride: Any
    ) -> None:
        slot = code.word(code.plus(slots, code.times(row, 8)))
        own = code.plus(new, code.times(row, row_stride, 2))
        with code.loop(0, num_heads) as head:
            place = code.plus(cache, code.times(head_stride, head))
            write_storing(code, d, code.plus(own, code.times(head, 2 * d)), slot, place, is_key=is_key)

    name = f"storing-int8-{'keys' if is_key else 'values'}-{num_heads}x{d}"
    return _per_row(name, write, 5, int8_attention_ir.__file__)
