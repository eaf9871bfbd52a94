"""What a decoder layer computes of each row by itself, between its products, in the form that a device has."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from rapid.kernels.cpu.rows import gated, rms_norm


class RowOperations(NamedTuple):
    """Functions of rows.

    ``add_norm``: (x, more [rows, size], weight [size], ε) to x + more and its RMS norm, as in
    `rapid.kernels.cpu.rows.rms_norm`. ``gate``: [rows, 2 · size] to silu(first half) · second half.
    """

    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    gate: Callable[[Tensor], Tensor]


def _add_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + more
    return total, rms_norm(total, weight, eps)


# Each operation by itself: compiled kernels on a CPU, PyTorch's operators elsewhere.
UNFUSED = RowOperations(_add_norm, gated)
