"""The pages of one sequence that a forward pass reads: all of them, or only some (a view, for drafting)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rapid.kv_cache.pool import KVPool


class PageTable:
    """Pages of a sequence, in order; the first ``length`` slots in them are filled.

    A forward pass first writes each layer's new rows behind ``length``, then moves ``length`` once (``advance``). So an
    interrupted pass leaves the table as it was.

    ``num_left_out`` earlier tokens of the sequence are in none of the pages. Keys are stored as they are rotated, so
    every token keeps its position: the next one has ``position``. A pass may read tokens again whose keys are there
    already. It overwrites none of the first ``num_kept`` slots: what it computes for them goes to the spare page.
    """

    def __init__(
        self, pool: KVPool, pages: list[int], length: int, *, num_left_out: int = 0, num_kept: int = 0
    ) -> None:
        self.pool, self.pages, self.length = pool, pages, length
        self.num_left_out, self.num_kept = num_left_out, num_kept
        self._runs: list[tuple[int, int]] | None = None

    @property
    def capacity(self) -> int:
        return len(self.pages) * self.pool.page_size

    @property
    def position(self) -> int:
        """The position of the next token in its sequence."""
        return self.num_left_out + self.length

    def runs(self, end: int, *, start: int = 0) -> list[tuple[int, int]]:
        """The slots of tokens ``start`` to ``end`` as (first, past the last) intervals; neighbour pages are joined."""
        size = self.pool.page_size
        if self._runs is None:
            breaks = np.flatnonzero(np.diff(self.pages) != 1) + 1
            starts, ends = np.concatenate(([0], breaks)), np.concatenate((breaks, [len(self.pages)]))
            self._runs = [
                (self.pages[a] * size, (self.pages[b - 1] + 1) * size) for a, b in zip(starts, ends, strict=True)
            ]
        cut, position = [], 0
        for first, last in self._runs:
            if position >= end:
                break
            if position + last - first > start:
                cut.append((first + max(0, start - position), min(last, first + end - position)))
            position += last - first
        return cut

    def slots(self, num_tokens: int) -> list[int]:
        """The slots of the next ``num_tokens`` tokens.

        Raises:
            ValueError: the tokens do not fit.
        """
        end, size = self.length + num_tokens, self.pool.page_size
        if end > self.capacity:
            raise ValueError(f"a cache for {self.capacity} tokens cannot hold {end}")
        spare = [self.pool.spare_slot] * max(0, min(end, self.num_kept) - self.length)
        return spare + [self.pages[i // size] * size + i % size for i in range(self.length + len(spare), end)]

    def advance(self, num_tokens: int) -> None:
        """Counts ``num_tokens`` written rows as filled."""
        self.length += num_tokens
