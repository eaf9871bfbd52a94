"""The parts of a decoder's layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rapid.kernels.cpu.rows import (
    rms_norm,
)
from rapid.kernels.linear import Linear


class RMSNorm:
    """x / sqrt(mean(x²) + ε) · weight, over the last dimension."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Layer(NamedTuple):
    device: torch.device
    attention_norm: RMSNorm
    qkv: Linear
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    output: Linear
    mlp_norm: RMSNorm
    gate_up: Linear
    down: Linear


class Heads(NamedTuple):
    """The query and the KV heads of a layer, their dimension, and the factor of the scores."""

    query: int
    kv: int
    d: int
    scaling: float
