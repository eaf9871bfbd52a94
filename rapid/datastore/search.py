"""How texts went on where they went like this: a datastore's texts in suffix arrays (REST, arXiv 2311.08252).

A segment holds the tokens of many texts, a `SEPARATOR` behind each, and the places of all its suffixes in order. So the
suffixes that begin with given tokens are neighbours, and a binary search finds them. Both arrays may be memory-mapped:
a search touches a few pages.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rapid.errors import ModelFileError

Tokens = NDArray[np.uint32]

SEPARATOR = 2**32 - 1  # no vocabulary is that large
SHORTEST_MATCH, LONGEST_MATCH = 2, 16  # tokens
MAX_MATCHES = 5000  # that are looked at
CONTINUATION = 10  # tokens behind a match


class Found(NamedTuple):
    """The continuation that most matches share, token by token.

    ``length`` is the length of the matches. ``shares[i]`` is the share of the matches, among those that went on with
    the tokens before, that went on with ``tokens[i]``. One more match counts as having gone on otherwise.
    """

    length: int
    tokens: list[int]
    shares: list[float]


class Segment:
    """``tokens`` [n] of texts, each with a `SEPARATOR` behind it, and their ``suffixes`` [n] in lexicographic order."""

    def __init__(self, tokens: Tokens, suffixes: Tokens) -> None:
        self.tokens, self.suffixes = tokens, suffixes
        self._memory, self._places = memoryview(tokens), memoryview(suffixes)  # type: ignore[arg-type]

    def matches(self, pattern: list[int]) -> range:
        """Which of ``suffixes`` begin with ``pattern``."""

        def beginning(place: int) -> list[int]:
            return self._memory[place : place + len(pattern)].tolist()

        first = bisect_left(self._places, pattern, key=beginning)
        return range(first, bisect_right(self._places, pattern, lo=first, key=beginning))

    def longest_match(self, tail: list[int]) -> int:
        """How many tokens at the end of ``tail`` occur, from `SHORTEST_MATCH` to `LONGEST_MATCH`; else 0."""
        lengths = range(SHORTEST_MATCH, min(LONGEST_MATCH, len(tail)) + 1)
        # Where a length does not occur no longer one does.
        num_found = bisect_left(lengths, True, key=lambda length: not self.matches(tail[-length:]))
        return lengths[num_found - 1] if num_found else 0

    def continuations(self, pattern: list[int]) -> Tokens:
        """The tokens behind up to `MAX_MATCHES` matches of ``pattern`` [matches, `CONTINUATION`]."""
        matches = self.matches(pattern)
        # Neighbours go on alike, so that the first of them would not speak for all.
        every = max(1, -(-len(matches) // MAX_MATCHES))
        ends = self.suffixes[matches.start : matches.stop : every].astype(np.int64) + len(pattern)
        behind: Tokens = self.tokens.take(ends[:, None] + np.arange(CONTINUATION), mode="clip")
        return behind


class Datastore:
    """What one request may draft from."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments

    def find(self, tail: list[int]) -> Found | None:
        """How the texts went on behind the longest match with the end of ``tail``; None where there is no match."""
        lengths = [segment.longest_match(tail) for segment in self._segments]
        length = max(lengths, default=0)
        if not length:
            return None
        pattern = tail[-length:]
        behind = [s.continuations(pattern) for s, own in zip(self._segments, lengths, strict=True) if own == length]
        return Found(length, *_best_chain(np.concatenate(behind)))


def _best_chain(rows: Tokens) -> tuple[list[int], list[float]]:
    """The most frequent token of each column, among the rows that begin with those before; and its share."""
    tokens: list[int] = []
    shares: list[float] = []
    for column in range(rows.shape[1]):
        values, counts = np.unique(rows[:, column], return_counts=True)
        most = int(counts.argmax())
        token = int(values[most])
        if token == SEPARATOR:
            break
        tokens.append(token)
        shares.append(int(counts[most]) / (len(rows) + 1))
        rows = rows[rows[:, column] == token]
    return tokens, shares


def suffix_array(tokens: Tokens) -> Tokens:
    """The places of all suffixes of ``tokens`` in lexicographic order.

    Raises:
        ModelFileError: the package that sorts them is absent.
    """
    try:
        from pydivsufsort import divsufsort
    except ImportError as error:
        raise ModelFileError("a datastore is built with pydivsufsort: pip install pydivsufsort") from error
    suffixes: Tokens = divsufsort(tokens).astype(np.uint32)
    return suffixes
