"""A batch whose queries are watched: what the tokens of an entry look for, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rapid.kernels.cpu.rows import rotate
from rapid.kernels.interface import Batch, QueryWatcher, Rotation


class WatchedBatch:
    """``batch``, with a watcher for the queries of some of its ``rows``."""

    def __init__(self, batch: Batch, watchers: Sequence[tuple[slice, QueryWatcher]], num_kv_heads: int) -> None:
        self._batch, self._watchers, self._num_kv_heads = batch, watchers, num_kv_heads

    def attend(self, layer: int, heads: Tensor, rotation: Rotation, scaling: float) -> Tensor:
        num_heads = heads.shape[1] - 2 * self._num_kv_heads
        for rows, watch in self._watchers:
            cos, sin = rotation
            queries = heads[rows, :num_heads].clone()  # the batch turns its own
            watch(layer, rotate(queries, cos[rows], sin[rows], num_heads), scaling)
        return self._batch.attend(layer, heads, rotation, scaling)
