"""How weights are rounded to few bits, the same numbers on every device; kernels pack the codes as they need them.

Every scale and offset is what the kernels multiply with: it is rounded to its own type before the codes are found.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny  # a range of nothing must not be divided by
_LARGEST_E4M3 = 448.0


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` [out, in] as int8 codes [out, in] times a float32 scale for each output [out]."""
    numbers = weight.float()
    scales = (numbers.abs().amax(1) / 127).clamp_min(_TINY)
    return (numbers / scales[:, None]).round().to(torch.int8), scales


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` [out, in] as float8_e4m3fn [out, in] times a float32 scale for each output [out]."""
    numbers = weight.float()
    scales = (numbers.abs().amax(1) / _LARGEST_E4M3).clamp_min(_TINY)
    # What lies above the largest number would become NaN, and a quotient may be rounded up.
    codes = (numbers / scales[:, None]).clamp(-_LARGEST_E4M3, _LARGEST_E4M3)
    return codes.to(torch.float8_e4m3fn), scales


def to_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """``weight`` [out, in] as codes from 0 to 15, and for each output and group of inputs a scale and an offset.

    A weight is code · scale + offset. ``in`` is a multiple of ``group``.

    Returns:
        uint8 codes [out, in], and scales and offsets, bfloat16 [out, in / group].
    """
    groups = weight.float().unflatten(1, (-1, group))
    low, high = groups.aminmax(dim=-1)
    scales, offsets = ((high - low) / 15).clamp_min(_TINY).bfloat16(), low.bfloat16()
    codes = (groups - offsets.float()[..., None]) / scales.float()[..., None]
    return codes.round().clamp(0, 15).to(torch.uint8).flatten(1), scales, offsets
