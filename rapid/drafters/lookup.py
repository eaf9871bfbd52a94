"""Drafts without a model: the tokens that followed the last time the text was like this (prompt lookup).

The index holds all n-grams of the prompt and the output. A match is extended backwards as far as the texts agree. The
drafter continues the longest match; of equally long matches it takes the latest.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence

from rapid.drafters.interface import Drafter
from rapid.drafters.session import Session
from rapid.speculation.controller import MAX_DRAFT_TOKENS, Offer
from rapid.speculation.draft import Draft, DraftLimits, VerifyResult, certain_draft
from rapid.speculation.learned import Acceptance

NGRAM = 3
_LONGEST_MATCH = 32
_PLACES = 8  # how many positions with the same n-gram are compared, the latest first

# Classes of match lengths, and for each class the prior probability that a continuation's token is accepted.
MATCH_LENGTHS = (4, 6, 9, 14, 24)
MATCH_PRIOR = (0.3, 0.45, 0.55, 0.65, 0.75, 0.9)


class LookupDrafter(Drafter):
    """Continues the text as it continued before. The tokens are known, so a draft costs no step."""

    label = "lookup"
    sampled = False

    def __init__(self, session: Session) -> None:
        self._session = session
        self._acceptance = session.learned.acceptance_of(self.label, lambda: Acceptance(MATCH_LENGTHS, MATCH_PRIOR))
        self._index: Lookup
        self._found: list[int] = []
        self._match_length = 0
        self._proposed = False

    async def start(self, *, wait: bool) -> None:
        self._index = await asyncio.to_thread(Lookup, self._session.request.prompt.tokens)

    def offer(self, room: int) -> Offer | None:
        found = self._index.find(room)
        if found is None:
            return None
        self._match_length, self._found = found
        lengths = range(self._match_length, self._match_length + min(len(self._found), MAX_DRAFT_TOKENS))
        return Offer(self.label, len(self._found), known=tuple(self._acceptance.of(length) for length in lengths))

    async def propose(self, limits: DraftLimits) -> Draft:
        self._proposed = True
        return certain_draft(len(self._session.output), self._found[: limits.max_tokens])

    def observe(self, result: VerifyResult) -> None:
        if self._proposed:
            for i in range(min(result.num_drafted, result.num_accepted + 1)):
                self._acceptance.observe(self._match_length + i, i < result.num_accepted)
        self._proposed = False
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

    def find(self, max_tokens: int) -> tuple[int, list[int]] | None:
        """(length of the longest match with the end of the text, up to ``max_tokens`` tokens that followed the match).

        None if no n-gram matches.
        """
        text, size = self._tokens, len(self._tokens)
        best_length, best_end = 0, 0
        for end in reversed(self._ends.get(tuple(text[size - NGRAM :]), [])[-_PLACES:]):
            length = NGRAM
            while length < min(_LONGEST_MATCH, end) and text[end - length - 1] == text[size - length - 1]:
                length += 1
            if length > best_length:
                best_length, best_end = length, end
        return (best_length, text[best_end : best_end + max_tokens]) if best_length else None
