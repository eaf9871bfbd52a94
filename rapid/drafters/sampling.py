"""What all drafters that sample have in common: they learn how often their tokens stand, by their confidence."""

from __future__ import annotations

from rapid.drafters.interface import Drafter
from rapid.drafters.session import Session
from rapid.speculation.controller import Offer
from rapid.speculation.draft import CONFIDENCES, VerifyResult
from rapid.speculation.learned import Acceptance

CONFIDENCE_PRIOR = (0.45, 0.5, 0.55, 0.6, 0.7, 0.78, 0.85, 0.9, 0.96)  # by class of CONFIDENCES


class SamplingDrafter(Drafter):
    """A subclass sets ``_proposed`` when it proposes."""

    sampled = True

    def __init__(self, session: Session) -> None:
        self._session = session
        self._acceptance = session.learned.acceptance_of(self.label, lambda: Acceptance(CONFIDENCES, CONFIDENCE_PRIOR))
        self._proposed = False

    def offer(self, room: int) -> Offer | None:
        acceptance = self._acceptance
        return Offer(self.label, room, by_confidence=acceptance.table(), mean=acceptance.mean())

    def observe(self, result: VerifyResult) -> None:
        if self._proposed:
            for i, confidence in enumerate(result.confidences[: result.num_accepted + 1]):
                self._acceptance.observe(confidence, i < result.num_accepted)
        self._proposed = False
