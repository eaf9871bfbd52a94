"""Brings the keys and values of a model into the range of 8-bit floats (e4m3), by scaling its weights at load.

A number of e4m3 keeps four significant bits between 2⁻⁶ and 448, so a factor for each KV head is enough, and it needs
no data: the input of a projection W is x/rms(x)·g, where x/rms(x) has a length of at most √h, so no key or value is
larger than √h·‖W_i·g‖ + |b_i|. Each head's factor is the power of two that brings this bound to at most 448, which is
exact in the model's weights. Keys are divided by it and queries multiplied; values are divided and the columns of the
output projection multiplied. The model computes the same function, kernels and pools know of no scale, and nothing is
ever clipped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rapid.models.layers import Heads
from rapid.models.tensor_parallel import local

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def fit_fp8(attention: Any, norm: Any, heads: Heads) -> None:
    """Scales the weights of a transformers ``attention`` behind ``norm``, in place; ``heads`` are this rank's."""
    group, gain = heads.query // heads.kv, local(norm.weight)
    # The rotation turns two numbers into one of at most √2 times the larger.
    if getattr(attention, "k_norm", None) is None:
        keys = _factors(2**0.5 * _bounds(attention.k_proj, gain), heads)
        _scale_rows(attention.k_proj, 1 / keys, heads.d)
        _scale_rows(attention.q_proj, keys.repeat_interleave(group), heads.d)
    else:  # normed heads of d numbers, whose gains all heads share
        key_gain = local(attention.k_norm.weight)
        shared = _power_of_two((2 * heads.d) ** 0.5 * key_gain.float().abs().amax())
        key_gain.mul_(1 / shared)
        local(attention.q_norm.weight).mul_(shared)
    values = _factors(_bounds(attention.v_proj, gain), heads)
    _scale_rows(attention.v_proj, 1 / values, heads.d)
    columns = values.repeat_interleave(group * heads.d)
    output = local(attention.o_proj.weight)
    output.mul_(columns.to(output.dtype))


def _bounds(projection: Any, gain: Tensor) -> Tensor:
    """The largest magnitude that each output of a projection behind a norm can have, [outputs]."""
    weight = local(projection.weight).float() * gain.float()
    bounds: Tensor = weight.norm(dim=1) * weight.shape[1] ** 0.5
    return bounds if projection.bias is None else bounds + local(projection.bias).float().abs()


def _factors(bounds: Tensor, heads: Heads) -> Tensor:
    return _power_of_two(bounds.view(heads.kv, heads.d).amax(1))


def _power_of_two(bounds: Tensor) -> Tensor:
    return torch.exp2((bounds.clamp_min(1e-6) / LARGEST).log2().ceil())


def _scale_rows(projection: Any, factors: Tensor, d: int) -> None:
    rows = factors.repeat_interleave(d)
    weight = local(projection.weight)
    weight.mul_(rows[:, None].to(weight.dtype))
    if projection.bias is not None:
        local(projection.bias).mul_(rows.to(weight.dtype))
