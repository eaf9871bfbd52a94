"""The keys and values of one sequence: preallocated, written in place, rolled back by setting a length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVLayout:
    """What one token occupies: ``num_layers`` × 2 × ``num_kv_heads`` × ``head_dim`` numbers of ``dtype``."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class KVCache:
    """Room for ``capacity`` tokens, of which the first ``length`` are filled.

    ``keys`` and ``values`` are [layers, KV heads, capacity, head size]. A forward pass first writes each layer's new
    rows behind ``length`` (``write``), then moves ``length`` once (``advance``), so an interrupted pass leaves the
    cache as it was.
    """

    def __init__(self, layout: KVLayout, capacity: int) -> None:
        shape = (layout.num_layers, layout.num_kv_heads, capacity, layout.head_dim)
        self.keys = torch.empty(shape, dtype=layout.dtype, device=layout.device)
        self.values = torch.empty(shape, dtype=layout.dtype, device=layout.device)
        self.capacity = capacity
        self.length = 0

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Puts ``keys`` and ``values`` [KV heads, n, head size] behind the filled part of ``layer``.

        Returns views of everything up to and including them: [KV heads, length + n, head size] each.

        Raises:
            ValueError: they do not fit. A lone row would otherwise broadcast into the empty slice and vanish.
        """
        end = self.length + keys.shape[1]
        if end > self.capacity:
            raise ValueError(f"a cache for {self.capacity} tokens cannot hold {end}")
        self.keys[layer, :, self.length : end] = keys
        self.values[layer, :, self.length : end] = values
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Counts ``num_tokens`` written rows as filled."""
        self.length += num_tokens

    def truncate(self, length: int) -> None:
        """Rolls back to the first ``length`` tokens; what lay behind them is overwritten by the next write."""
        self.length = min(self.length, length)
