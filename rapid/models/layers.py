"""The parts of a decoder's layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rapid.kernels.cpu.rows import rms_norm
from rapid.kernels.linear import Linear
from rapid.kernels.rows import RowOperations


class RMSNorm:
    """x / sqrt(mean(x²) + ε) · weight, over the last dimension."""

    def __init__(self, weight: Tensor, eps: float, rows: RowOperations) -> None:
        self.weight, self.eps = weight, eps
        self._rows = rows

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def added(self, x: Tensor, more: Tensor | None) -> tuple[Tensor, Tensor]:
        """``x`` + ``more``, if there is more, and its norm."""
        return (x, self(x)) if more is None else self._rows.add_norm(x, more, self.weight, self.eps)


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
