"""What drafters have in common whose tokens are known beforehand, so that a draft costs no step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rapid.drafters.interface import Drafter
from rapid.drafters.session import Session
from rapid.speculation.controller import MAX_DRAFT_TOKENS, Offer
from rapid.speculation.draft import Draft, DraftLimits, VerifyResult, certain_draft
from rapid.speculation.learned import Acceptance


class Known(NamedTuple):
    """Tokens that may come next. ``evidence[i]`` says how much speaks for ``tokens[i]``, given those before it."""

    tokens: list[int]
    evidence: Sequence[float]


class KnownDrafter(Drafter):
    """Drafts what `find` finds. Its q is one-hot; it learns, from ``prior`` on, what the evidence is worth."""

    sampled = False

    def __init__(self, session: Session, prior: Callable[[], Acceptance]) -> None:
        self._session = session
        self._acceptance = session.learned.acceptance_of(self.label, prior)
        self._found = Known([], [])
        self._proposed = False

    @abstractmethod
    def find(self, room: int) -> Known | None:
        """Up to ``room`` tokens that may follow the output; None if there are none."""

    def offer(self, room: int) -> Offer | None:
        found = self.find(room)
        if found is None:
            return None
        self._found = found
        stands = tuple(self._acceptance.of(value) for value in found.evidence[:MAX_DRAFT_TOKENS])
        return Offer(self.label, len(found.tokens), known=stands)

    async def propose(self, limits: DraftLimits) -> Draft:
        self._proposed = True
        return certain_draft(len(self._session.output), self._found.tokens[: limits.max_tokens])

    def observe(self, result: VerifyResult) -> None:
        if self._proposed:
            tried = self._found.evidence[: min(result.num_drafted, result.num_accepted + 1)]
            for i, value in enumerate(tried):
                self._acceptance.observe(value, i < result.num_accepted)
        self._proposed = False
