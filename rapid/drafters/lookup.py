"""Drafts without a model: the tokens that followed the last time the text was like this (prompt lookup).

The index holds all n-grams of the prompt and the output. A match is extended backwards as far as the texts agree. The
drafter continues the longest match; of equally long matches it takes the latest.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence

from rapid.drafters.known import Known, KnownDrafter
from rapid.drafters.session import Session
from rapid.speculation.draft import VerifyResult
from rapid.speculation.learned import Acceptance

NGRAM = 3
_LONGEST_MATCH = 32
_PLACES = 8  # how many positions with the same n-gram are compared, the latest first

# Classes of match lengths, and for each class the prior probability that a continuation's token is accepted.
MATCH_LENGTHS = (4, 6, 9, 14, 24)
MATCH_PRIOR = (0.3, 0.45, 0.55, 0.65, 0.75, 0.9)


class LookupDrafter(KnownDrafter):
    """Continues the text as it continued before."""

    label = "lookup"

    def __init__(self, session: Session) -> None:
        super().__init__(session, lambda: Acceptance(MATCH_LENGTHS, MATCH_PRIOR))
        self._index: Lookup

    async def start(self, *, wait: bool) -> None:
        self._index = await asyncio.to_thread(Lookup, self._session.request.prompt.tokens)

    def find(self, room: int) -> Known | None:
        found = self._index.find(room)
        if found is None:
            return None
        length, tokens = found
        return Known(tokens, range(length, length + len(tokens)))

    def observe(self, result: VerifyResult) -> None:
        super().observe(result)
        self._index.extend(result.tokens)


class Lookup:
    """An index over ``tokens``, which `extend` makes longer. Building it takes about a microsecond a token."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._ends: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)  # where each n-gram ends
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends ``tokens`` to the text."""
        first = max(NGRAM, len(self._tokens))
        self._tokens.extend(tokens)
        text = self._tokens
        # No token follows the last n-gram yet; the next call indexes it.
        for end in range(first, len(text)):
            self._ends[tuple(text[end - NGRAM : end])].append(end)

    def find(self, max_tokens: int, drafted: Sequence[int] = ()) -> tuple[int, list[int]] | None:
        """(length of the longest match with the end of the text, up to ``max_tokens`` tokens that followed the match).

        The text ends with ``drafted``, which the index does not have. None if no n-gram matches.
        """
        text = [*self._tokens, *drafted] if drafted else self._tokens
        size = len(text)
        best_length, best_end = 0, 0
        for end in reversed(self._ends.get(tuple(text[size - NGRAM :]), [])[-_PLACES:]):
            length = NGRAM
            while length < min(_LONGEST_MATCH, end) and text[end - length - 1] == text[size - length - 1]:
                length += 1
            if length > best_length:
                best_length, best_end = length, end
        return (best_length, text[best_end : best_end + max_tokens]) if best_length else None
