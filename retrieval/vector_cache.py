"""Vectors that were computed lately."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


class VectorCache:
    """The vectors of the `size` most recently used texts, by the texts' digests.

    They lie in one array. As separate small arrays between the large ones of each pass they would fragment the heap:
    the allocator could neither reuse nor return more and more memory.
    """

    def __init__(self, size: int, dimension: int) -> None:
        self._vectors = np.empty((size, dimension), dtype=np.float32)  # uses memory as it is written
        self._rows: OrderedDict[bytes, int] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()

    def recall(self, digests: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """Return copies of the cached vectors."""
        with self._lock:
            return {digest: self._vectors[self._rows[digest]].copy() for digest in digests if digest in self._rows}

    def remember(self, vectors: Mapping[bytes, NDArray[np.float32]]) -> None:
        with self._lock:
            for digest, vector in vectors.items():
                if digest not in self._rows:
                    is_full = len(self._rows) == len(self._vectors)
                    self._rows[digest] = self._rows.popitem(last=False)[1] if is_full else len(self._rows)
                    self._vectors[self._rows[digest]] = vector
                self._rows.move_to_end(digest)
