"""How long the rest of a run takes, by what its answers took so far."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Literal, NamedTuple

# A prompt that is read as for the first time, a document that is new to the row, and one that it was asked about.
Kind = Literal["unread", "new", "known"]


class Cell(NamedTuple):
    """Answers that take about as long as each other."""

    task: str
    row: str
    strategy: str
    temperature: float
    kind: Kind


class Estimate:
    """The time of the answers in ``left``.

    A cell of which nothing was measured takes as long as the nearest one of its task: of the same row at another
    temperature, of another row with the same strategy, of any row; each with the same kind if there is one.
    """

    def __init__(self, left: Iterable[Cell]) -> None:
        self._left = Counter(left)
        self._sums: defaultdict[tuple[object, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])

    def learn(self, cell: Cell, seconds: float) -> None:
        """An answer of ``cell`` took so long."""
        for level in _levels(cell):
            self._sums[level][0] += seconds
            self._sums[level][1] += 1

    def finish(self, cell: Cell) -> None:
        """One answer of ``cell`` is no longer left."""
        self._left[cell] -= 1

    def left_s(self) -> float | None:
        """The seconds for all that is left, one after another; None while nothing is known."""
        if not self._sums:
            return None
        return sum(number * self.expected_s(cell) for cell, number in self._left.items() if number > 0)

    def expected_s(self, cell: Cell) -> float:
        """The seconds of an answer of ``cell``; something must have been learnt."""
        for level in _levels(cell):
            if level in self._sums:
                seconds, number = self._sums[level]
                return seconds / number
        seconds, number = self._sums[("all",)]
        return seconds / number


def _levels(cell: Cell) -> list[tuple[object, ...]]:
    task, row, strategy, _, kind = cell
    return [
        cell,
        (task, row, kind),
        (task, strategy, kind),
        (task, row),
        (task, strategy),
        (task, kind),
        (task,),
        ("all",),
    ]
