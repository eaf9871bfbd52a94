"""Linear layers in the fastest form of each device, from plain weights: dense, or quantised for a cheap drafter.

On a CPU weights are packed once, which makes a product with few rows cheap: for compiled kernels in bfloat16 and below
(`rapid.kernels.cpu.linear`), into oneDNN's layout in float32.
The quantised kernels on CUDA are torchao's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapid.errors import ModelFileError
from rapid.kernels.cpu.jit import available
from rapid.kernels.cpu.linear import CompiledLinear

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
    if scheme == "none":
        return
    if device.type == "cuda":
        _torchao_config(scheme)
    elif dtype != torch.bfloat16:
        raise ModelFileError(f"quantization {scheme!r} on a CPU multiplies bfloat16: leave dtype at auto")
    elif not available():
        raise ModelFileError(f"quantization {scheme!r} on a CPU needs llvmlite on Linux: pip install llvmlite")


def make_linear(weight: Tensor, bias: Tensor | None, scheme: str, *, is_head: bool = False) -> Linear:
    """The product with ``weight`` [out, in] (+ ``bias`` [out]) as a function of [rows, in], under a scheme."""
    if weight.device.type == "cpu":
        # The output layer decides between tokens with almost equal logits; with four bits it loses most acceptance.
        bits = {"none": 16, "int8": 8, "int4": 8 if is_head else 4}[scheme]
        if bits < 16 or (weight.dtype == torch.bfloat16 and available()):
            return CompiledLinear(weight, bias, bits)
        return _repacked(weight, bias)
    if scheme == "none":
        return lambda rows: F.linear(rows, weight, bias)
    return _torchao(weight, bias, scheme)


def _repacked(weight: Tensor, bias: Tensor | None) -> Linear:
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_reorder_linear_weight"):
        return lambda rows: F.linear(rows, weight, bias)
    packed = ops._reorder_linear_weight(weight.contiguous(), None)
    product = ops._linear_pointwise.default
    return lambda rows: cast(Tensor, product(rows, packed, bias, "none", [], ""))


def _torchao(weight: Tensor, bias: Tensor | None, scheme: str) -> Linear:
    quantize, config = _torchao_config(scheme)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    quantize(layer, config)
    return layer


def _torchao_config(scheme: str) -> tuple[Callable[..., Any], Any]:
    try:
        from torchao import quantization as ao
    except ImportError as error:
        raise ModelFileError(f"quantization {scheme!r} on CUDA needs torchao: pip install torchao") from error
    configs = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig", "int4": "Int4WeightOnlyConfig"}
    # The layout of PyTorch's own product with four bits; torchao's default is for kernels of another package.
    layout = {"int4_packing_format": "tile_packed_to_4d"} if scheme == "int4" else {}
    return ao.quantize_, getattr(ao, configs[scheme])(**layout)
