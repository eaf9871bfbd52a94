"""Linear layers as each device multiplies fastest, from plain weights: dense, or quantised for a cheap drafter.

Dense weights on a CPU are reordered once into oneDNN's own layout, which is what makes a product with few rows cheap:
`python -m benchmarks.products` says how cheap. The quantised kernels are PyTorch's on a CPU and torchao's on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapid.errors import ModelFileError

Linear = Callable[[Tensor], Tensor]

SCHEMES: dict[str, tuple[str, ...]] = {"cpu": ("none", "int8", "int4"), "cuda": ("none", "int8", "fp8", "int4")}

# From this many rows on, PyTorch's weight-only kernels for CPUs lose to a dense product with weights restored for it.
_RESTORE_FROM = 24
_GROUP = 32  # weights that share a scale and a zero in int4, as in the Q4_1 files that people run on CPUs


def check_scheme(scheme: str, device: torch.device) -> None:
    """Refuses what the device cannot do.

    Raises:
        ModelFileError: ``scheme`` is not for this device, or needs a package that is not installed.
    """
    known = SCHEMES.get(device.type, ("none",))
    if scheme not in known:
        raise ModelFileError(f"quantization {scheme!r} is not for {device.type}; there: {', '.join(known)}")
    if scheme != "none" and device.type == "cuda":
        _torchao_config(scheme)


def make_linear(weight: Tensor, bias: Tensor | None, scheme: str, *, is_head: bool = False) -> Linear:
    """The product with ``weight`` [out, in] (+ ``bias`` [out]) as a function of [rows, in], under a scheme."""
    if weight.device.type == "cpu":
        # The output layer decides between tokens with almost equal logits: four bits there cost most of the acceptance.
        kinds = {"none": _dense_cpu, "int8": _int8_cpu, "int4": _int8_cpu if is_head else _int4_cpu}
        return kinds[scheme](weight, bias)
    if scheme == "none":
        return lambda rows: F.linear(rows, weight, bias)
    return _torchao(weight, bias, scheme)


def _dense_cpu(weight: Tensor, bias: Tensor | None) -> Linear:
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_reorder_linear_weight"):
        return lambda rows: F.linear(rows, weight, bias)
    packed = ops._reorder_linear_weight(weight.contiguous(), None)
    product = ops._linear_pointwise.default
    return lambda rows: cast(Tensor, product(rows, packed, bias, "none", [], ""))


def _int8_cpu(weight: Tensor, bias: Tensor | None) -> Linear:
    """One scale per output row. Activations stay as they are: in int8 their outliers drown all else."""
    scales = (weight.float().abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (weight.float() / scales[:, None]).round().to(torch.int8)
    scales = scales.to(weight.dtype)

    def product(rows: Tensor) -> Tensor:
        if len(rows) >= _RESTORE_FROM:
            return F.linear(rows, codes.to(rows.dtype) * scales[:, None], bias)
        output = torch._weight_int8pack_mm(rows.contiguous(), codes, scales)
        return output if bias is None else output + bias

    return product


def _int4_cpu(weight: Tensor, bias: Tensor | None) -> Linear:
    """A scale and a zero per 32 weights. Weights that came from a Q4_1 file keep their values."""
    out, size = weight.shape
    if size % _GROUP or out % 16:
        return _int8_cpu(weight, bias)
    groups = weight.float().view(out, -1, _GROUP)
    low, high = groups.aminmax(dim=-1)
    scales = ((high - low) / 15).clamp_min(torch.finfo(torch.float32).tiny)
    codes = ((groups - low[..., None]) / scales[..., None]).round().clamp(0, 15).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.view(out, size).int(), 2)
    zeros = low + 8 * scales  # the kernel's codes run from -8 to 7
    parameters = torch.stack((scales, zeros), -1).transpose(0, 1).contiguous().to(weight.dtype)
    steps, offsets = scales.to(weight.dtype)[..., None], low.to(weight.dtype)[..., None]

    def product(rows: Tensor) -> Tensor:
        if len(rows) >= _RESTORE_FROM:
            return F.linear(rows, torch.addcmul(offsets, codes.to(rows.dtype), steps).view(out, size), bias)
        output = torch._weight_int4pack_mm_for_cpu(rows.contiguous(), packed, _GROUP, parameters)
        return output if bias is None else output + bias

    return product


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
    return ao.quantize_, getattr(ao, configs[scheme])()
