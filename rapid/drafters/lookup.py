"""Drafts for nothing: what followed the last time the text went like this (prompt lookup).

All n-grams of the prompt and the output are indexed; a match is extended backwards as far as it goes, and of several
places the one with the longest match is continued, the latest of equals.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

NGRAM = 3
_LONGEST_MATCH = 32
_PLACES = 8  # how many places with the same n-gram are compared, the latest first


class Lookup:
    """An index over ``tokens``, which grows with `extend`. Building takes about a microsecond a token."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._ends: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)  # where each n-gram ends
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends ``tokens`` to the text."""
        first = max(NGRAM, len(self._tokens))
        self._tokens.extend(tokens)
        text = self._tokens
        # The n-gram at the very end has nothing behind it yet, and is indexed with the next token.
        for end in range(first, len(text)):
            self._ends[tuple(text[end - NGRAM : end])].append(end)

    def find(self, max_tokens: int) -> tuple[int, list[int]] | None:
        """(length of the longest match with the end of the text, up to ``max_tokens`` that followed there)."""
        text, size = self._tokens, len(self._tokens)
        best_length, best_end = 0, 0
        for end in reversed(self._ends.get(tuple(text[size - NGRAM :]), [])[-_PLACES:]):
            length = NGRAM
            while length < min(_LONGEST_MATCH, end) and text[end - length - 1] == text[size - length - 1]:
                length += 1
            if length > best_length:
                best_length, best_end = length, end
        return (best_length, text[best_end : best_end + max_tokens]) if best_length else None
