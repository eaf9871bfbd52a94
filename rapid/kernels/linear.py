"""Linear layers in the fastest form of each device, from plain weights: dense, or quantised for a cheap drafter.

On a CPU weights are packed once, which makes a product with few rows cheap: for compiled kernels in bfloat16 and below
(`rapid.kernels.cpu.linear`), into oneDNN's layout in float32.
On CUDA quantised weights stay packed for Triton kernels (`rapid.kernels.cuda.low_bit`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rapid.errors import ModelFileError
from rapid.kernels.cpu.jit import available
from rapid.kernels.cpu.linear import CompiledLinear
from rapid.kernels.cuda.low_bit import low_bit_linear

Linear = Callable[[Tensor], Tensor]

SCHEMES: dict[str, tuple[str, ...]] = {"cpu": ("none", "int8", "int4"), "cuda": ("none", "int8", "fp8", "int4")}


def check_scheme(scheme: str, device: torch.device, dtype: torch.dtype) -> None:
    """Checks that the device can multiply rows of ``dtype`` under ``scheme``.

    Raises:
        ModelFileError: ``scheme`` is not for this device, or needs a package that is not installed.
    """
    known = SCHEMES.get(device.type, ("none",))
    if scheme not in known:
        raise ModelFileError(f"quantization {scheme!r} is not for {device.type}; there: {', '.join(known)}")
    if scheme == "none" or device.type == "cuda":
        return
    if dtype != torch.bfloat16:
        raise ModelFileError(f"quantization {scheme!r} on a CPU multiplies bfloat16: leave dtype at auto")
    if not available():
        raise ModelFileError(f"quantization {scheme!r} on a CPU needs llvmlite on Linux: pip install llvmlite")


def make_linear(weight: Tensor, bias: Tensor | None, scheme: str, *, is_head: bool = False) -> Linear:
    """The product with ``weight`` [out, in] (+ ``bias`` [out]) as a function of [rows, in], under a scheme."""
    if is_head and scheme == "int4":
        scheme = "int8"  # it decides between tokens with almost equal logits; with four bits it loses most acceptance
    if weight.device.type == "cpu":
        bits = {"none": 16, "int8": 8, "int4": 4}[scheme]
        if bits < 16 or (weight.dtype == torch.bfloat16 and available()):
            return CompiledLinear(weight, bias, bits)
        return _repacked(weight, bias)
    if scheme == "none":
        return lambda rows: F.linear(rows, weight, bias)
    return low_bit_linear(weight, bias, scheme)


def _repacked(weight: Tensor, bias: Tensor | None) -> Linear:
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_reorder_linear_weight"):
        return lambda rows: F.linear(rows, weight, bias)
    packed = ops._reorder_linear_weight(weight.contiguous(), None)
    product = ops._linear_pointwise.default
    return lambda rows: cast(Tensor, product(rows, packed, bias, "none", [], ""))
