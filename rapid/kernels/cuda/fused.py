"""A layer's operations between its products, one Triton kernel each where PyTorch launches several.

Over few rows a kernel takes as long as its launch, so each launch that a decode step lacks makes it shorter. The
kernels depend on releases of Triton and on the device: one that fails on a small case of the model's own sizes, or is
wrong there, is named in a warning, and PyTorch's operators take its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rapid.kernels.cuda.attention import FP8, Writer, rotate_and_write
from rapid.kernels.interface import Rotation
from rapid.kernels.rows import UNFUSED, RowOperations
from rapid.kv_cache.pool import KVLayout

logger = logging.getLogger(__name__)

GATE_BLOCK = 1024
HEADS, ROTATING_WARPS = 8, 2  # of one program that rotates
# Of the largest number: a type's rounding, a few times.
_TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2, FP8: 0.08}


def add_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x`` + ``more`` [rows, size], and its RMS norm times ``weight`` [size]."""
    from rapid.kernels.cuda.fused_kernels import add_norm_row

    x, more = x.contiguous(), more.contiguous()
    total, normed, block = torch.empty_like(x), torch.empty_like(x), _power_of_two(x.shape[1])
    with torch.cuda.device_of(x):  # Triton launches on the current device
        add_norm_row[(len(x),)](
            x, more, weight, total, normed, x.shape[1], eps, BLOCK=block, num_warps=norm_warps(block)
        )
    return total, normed


def norm_warps(block: int) -> int:
    """How many warps share a row: each thread reads sixteen bytes at once, of large rows several times."""
    return min(16, max(1, block // 256))


def gate(x: Tensor) -> Tensor:
    """silu(first half) · second half of every row [rows, 2 · size]."""
    from rapid.kernels.cuda.fused_kernels import gate_row

    x = x.contiguous()
    output = x.new_empty(len(x), x.shape[1] // 2)
    with torch.cuda.device_of(x):
        gate_row[len(x), -(-output.shape[1] // GATE_BLOCK)](x, output, output.shape[1], BLOCK=GATE_BLOCK)
    return output


def triton_rotate_and_write(heads: Tensor, rotation: Rotation, slots: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`rotate_and_write` in one kernel; the queries are rotated where they are."""
    from rapid.kernels.cuda.fused_kernels import rotate_and_write_heads

    cos, sin = (angles.contiguous() for angles in rotation)
    _, kv_heads, d = keys.shape
    if heads.stride()[1:] != (d, 1):
        heads = heads.contiguous()
    num_heads = heads.shape[1] - 2 * kv_heads
    with torch.cuda.device_of(heads):
        rotate_and_write_heads[len(heads), -(-heads.shape[1] // HEADS)](
            heads,
            cos,
            sin,
            slots,
            keys,
            values,
            heads.stride(0),
            cos.stride(0),
            NUM_HEADS=num_heads,
            KV_HEADS=kv_heads,
            D=d,
            BLOCK_HALF=_power_of_two(d // 2),
            HEADS=HEADS,
            num_warps=ROTATING_WARPS,
        )
    return heads[:, :num_heads]


FUSED = RowOperations(add_norm, gate)


def choose_rows(device: torch.device, dtype: torch.dtype, hidden: int, intermediate: int) -> RowOperations:
    """The operations on rows of ``hidden`` numbers, and of twice ``intermediate``, that are right on ``device``."""
    if device.type != "cuda":
        return UNFUSED
    reason = rows_fault(FUSED, device, dtype, hidden, intermediate)
    if reason is None:
        return FUSED
    logger.warning("norm and gate are PyTorch's on %s: %s", device, reason)
    return UNFUSED


def choose_writer(layout: KVLayout, num_heads: int) -> Writer:
    """What rotates queries and keys, and writes keys and values, over ``layout``; found out on its first device."""
    if layout.device.type != "cuda":
        return rotate_and_write
    reason = writer_fault(triton_rotate_and_write, layout, num_heads)
    if reason is None:
        return triton_rotate_and_write
    logger.warning("rotation and writing are PyTorch's on %s: %s", layout.device, reason)
    return rotate_and_write


_ROWS = 3
_EPS = 1e-5
_NUM_SLOTS = 9


@torch.inference_mode()
def rows_fault(
    rows: RowOperations, device: torch.device, dtype: torch.dtype, hidden: int, intermediate: int
) -> str | None:
    """What is wrong with ``rows``: an error, or how far they are from float32. None if nothing is."""
    random = _Random(device, dtype)
    x, more, weight, gates = (
        random(_ROWS, hidden),
        random(_ROWS, hidden),
        random(hidden),
        random(_ROWS, 2 * intermediate),
    )

    def pairs() -> list[tuple[Tensor, Tensor]]:
        total, normed = rows.add_norm(x, more, weight, _EPS)
        first, second = gates.float().chunk(2, -1)
        return [
            (total, x.float() + more.float()),
            (normed, F.rms_norm((x + more).float(), (hidden,), weight.float(), _EPS)),
            (rows.gate(gates), F.silu(first) * second),
        ]

    return _fault(pairs, _TOLERANCES[dtype])


@torch.inference_mode()
def writer_fault(writer: Writer, layout: KVLayout, num_heads: int) -> str | None:
    """What is wrong with ``writer``: an error, or how far it is from float32. None if nothing is."""
    random, d, kv_heads = _Random(layout.device, layout.dtype), layout.head_dim, layout.num_kv_heads
    heads, angles = random(_ROWS, num_heads + 2 * kv_heads, d), random(_ROWS, d)
    rotation = angles.cos(), angles.sin()
    slots = torch.tensor([7, 0, 4], device=layout.device)
    exact_keys, exact_values = (torch.zeros(_NUM_SLOTS, kv_heads, d, device=layout.device) for _ in range(2))
    exact = rotate_and_write(heads.float(), _in_float32(rotation), slots, exact_keys, exact_values)

    def pairs() -> list[tuple[Tensor, Tensor]]:
        keys, values = (torch.zeros_like(exact_keys, dtype=layout.stored_dtype) for _ in range(2))
        query = writer(heads, rotation, slots, keys, values)
        return [(keys, exact_keys), (values, exact_values), (query, exact)]

    return _fault(pairs, _TOLERANCES[layout.stored_dtype])


def _in_float32(rotation: Rotation) -> Rotation:
    cos, sin = rotation
    return cos.float(), sin.float()


class _Random:
    """The same numbers on every device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self._device, self._dtype)


def _fault(pairs: Callable[[], list[tuple[Tensor, Tensor]]], tolerance: float) -> str | None:
    """The error of ``pairs``, or the distance of a computed tensor from the exact one, of the largest number."""
    try:
        # Reading the distances waits for the device, so an error of a kernel is raised here, not later.
        distances = [((ours.float() - exact).abs().max() / exact.abs().max()).item() for ours, exact in pairs()]
    except Exception as error:  # a compiler's errors are of any kind
        return f"{type(error).__name__}: {error}".splitlines()[0]
    # NaN is not below any tolerance.
    wrong = [distance for distance in distances if not distance <= tolerance]
    return f"it is {wrong[0]:.2g} from float32 where {tolerance:.2g} is allowed" if wrong else None


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
