"""Chooses each round whether to draft, with which drafter and how many tokens, from measured costs and acceptance.

Decoding runs at some rate λ (tokens per millisecond). One more draft token pays if the probability that it is accepted
is above λ times its cost in milliseconds. This comparison decides where a draft ends, how many known tokens are
verified, and whether a drafter is asked at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rapid.speculation.draft import DraftLimits, VerifyResult
from rapid.speculation.learned import HOPE, Costs

MAX_DRAFT_TOKENS = 16

_PLAIN_ROUNDS = 3  # at the start of a request
_DECAY = 0.9  # of the running rate, per round
_NEWEST = 0.2  # the weight of the newest round in how many sequences share a pass
_BELIEF = 4.0  # rounds that the expectation before the first one is worth: a token or two is bad luck, not a proof
_FIRST_REST, _LONGEST_REST = 24, 192  # rounds that a drafter rests between two tries, while it does not pay


@dataclass(frozen=True)
class Offer:
    """A drafter's offer for the next round, of at most ``max_tokens`` tokens.

    ``known`` is for tokens that are known already and cost no draft step: P(token i is accepted | the tokens before it
    are) for the first of them. If ``known`` is None the tokens are yet to be drafted, and each costs a step; then
    ``by_confidence`` is P(a token is accepted) by class of the drafter's confidence, and ``mean`` its mean.
    """

    label: str
    max_tokens: int
    known: tuple[float, ...] | None = None
    by_confidence: tuple[float, ...] = ()
    mean: float = HOPE


class RoundPlan(NamedTuple):
    """The next round verifies a draft of the drafter ``source`` within ``limits``; "none" means no draft."""

    source: str = "none"
    limits: DraftLimits = DraftLimits(0)


PLAIN_ROUND = RoundPlan()


@dataclass
class _Record:
    """One drafter's rounds in this request: decayed tokens and milliseconds, and its rest while it does not pay."""

    tokens: float
    ms: float
    rest: int = _FIRST_REST
    resting: int = 0

    @property
    def rate(self) -> float:
        """Tokens per millisecond."""
        return self.tokens / self.ms


class DraftController:
    """One request's choices. ``fixed`` is a given γ; with None the controller chooses γ.

    A request with a seed must not depend on the clock: with ``timed`` False the costs stay as they are, and other
    requests do not count. Requests that share a pass all wait for what each of them adds to it. With ``shares_device``
    they also wait for each other's drafts.

    With ``every_position`` the target needs a q at each position. So every round has a draft, whose last token only
    brings the q of the position behind the tokens before it. γ counts these tokens; the step of the last one is a part
    of a round's own cost.
    """

    def __init__(
        self,
        fixed: int | None,
        costs: Costs,
        *,
        timed: bool = True,
        every_position: bool = False,
        shares_device: bool = False,
    ) -> None:
        self._fixed, self._costs, self._timed, self._every_position = fixed, costs, timed, every_position
        self._shares_device = shares_device
        self._num_verifying = self._num_drafting = 1.0  # running means of how many sequences share a pass
        self._records: dict[str, _Record] = {}
        self._plain_rounds = 0

    def choose(self, offers: Sequence[Offer]) -> RoundPlan:
        """The best of the ``offers``, or a plain round.

        A fixed γ takes the first offer, at any cost.
        """
        plan = self._best(offers)
        if not self._every_position or not offers:
            return plan
        return RoundPlan(offers[0].label if plan == PLAIN_ROUND else plan.source, plan.limits.longer(1))

    def _best(self, offers: Sequence[Offer]) -> RoundPlan:
        if self._fixed is not None:
            if self._fixed == 0 or not offers:
                return PLAIN_ROUND
            return RoundPlan(offers[0].label, DraftLimits(min(self._fixed, offers[0].max_tokens)))
        if self._timed and self._plain_rounds < _PLAIN_ROUNDS:  # the baseline for drafting
            return PLAIN_ROUND
        best, rate = PLAIN_ROUND, 1 / self._costs.plain
        paying = [offer for offer in offers if offer.known is None and self._pays(offer)]
        if paying:
            offer = max(paying, key=lambda offer: self._record(offer).rate)
            rate = max(rate, self._record(offer).rate)
            waiting = self._num_verifying / self._num_drafting if self._shares_device else 1.0
            step = self._costs.of_draft(offer.label) * max(1.0, waiting) + self._extra(offer.label)
            # The acceptance of the next token is known once it is drawn; until then the mean is the estimate.
            floor = min(0.9, rate * step / offer.mean)
            best = RoundPlan(
                offer.label, DraftLimits(min(offer.max_tokens, MAX_DRAFT_TOKENS), floor, offer.by_confidence)
            )
        for offer in offers:
            num_tokens, known_rate = self._follow(offer, rate)
            if num_tokens and known_rate > rate:
                best, rate = RoundPlan(offer.label, DraftLimits(num_tokens)), known_rate
        return best

    def observe(self, plan: RoundPlan, outcome: VerifyResult, round_ms: float) -> None:
        """Updates costs and records with the outcome of a round that took ``round_ms``."""
        num_drafted = outcome.num_drafted
        # A drafter that rested must first read the tokens written in the meantime. That cost is not a draft cost.
        step_ms = outcome.draft_step_ms or self._costs.of_draft(plan.source)
        draft_ms = outcome.draft_ms - step_ms * self._every_position
        catching_up = max(0.0, draft_ms - num_drafted * step_ms)
        if self._timed:
            self._measure(plan, outcome, draft_ms, round_ms)
        for label, record in self._records.items():
            record.resting = 0 if label == plan.source else record.resting + 1
        if plan.source in self._records:  # only drafters that sample have records
            record = self._records[plan.source]
            took = round_ms - catching_up if self._timed else self._expected_ms(plan.source, num_drafted)
            record.tokens = _DECAY * record.tokens + outcome.num_accepted + 1
            record.ms = _DECAY * record.ms + took
            if record.rate * self._costs.plain >= 1:
                record.rest = _FIRST_REST

    def _measure(self, plan: RoundPlan, outcome: VerifyResult, draft_ms: float, round_ms: float) -> None:
        self._num_verifying += _NEWEST * (outcome.num_sequences - self._num_verifying)
        if outcome.num_drafted == 0:
            self._plain_rounds += 1
            self._costs.learn_round("", 0, round_ms)
            return
        # The tokens of other drafts in the pass have cost time, too.
        num_drafted = max(outcome.num_drafted, outcome.num_pass_drafted)
        self._costs.learn_round(plan.source, num_drafted, round_ms - draft_ms)
        if outcome.draft_step_ms:
            self._num_drafting += _NEWEST * (outcome.num_draft_sequences - self._num_drafting)
            self._costs.learn_draft(plan.source, outcome.draft_step_ms)

    def _extra(self, label: str) -> float:
        """The time of one more token to verify, for all requests that wait for it."""
        return self._costs.of_extra(label) * self._num_verifying

    def _record(self, offer: Offer) -> _Record:
        """The drafter's record. It begins with the rounds that its mean acceptance and the costs let one expect."""
        record = self._records.get(offer.label)
        if record is None:
            expected = [
                (sum(offer.mean**i for i in range(n + 1)), self._expected_ms(offer.label, n)) for n in range(1, 5)
            ]
            tokens, ms = max(expected, key=lambda one: one[0] / one[1])
            record = self._records[offer.label] = _Record(_BELIEF * tokens, _BELIEF * ms)
        return record

    def _expected_ms(self, label: str, num_drafted: int) -> float:
        return self._costs.plain + num_drafted * (self._costs.of_draft(label) + self._costs.of_extra(label))

    def _pays(self, offer: Offer) -> bool:
        record = self._record(offer)
        if record.rate * self._costs.plain >= 1:
            return True
        if record.resting < record.rest:
            return False
        record.rest = min(2 * record.rest, _LONGEST_REST)  # try again, and wait longer if that fails too
        record.tokens, record.ms = record.tokens / 2, record.ms / 2
        return True

    def _follow(self, offer: Offer, rate: float) -> tuple[int, float]:
        """How many known tokens pay, and the rate of a round that verifies them (tokens per millisecond)."""
        survives, gained, num_tokens = 1.0, 0.0, 0
        for acceptance in (offer.known or ())[:MAX_DRAFT_TOKENS]:
            survives *= acceptance
            if survives < rate * self._extra(offer.label):
                break
            num_tokens, gained = num_tokens + 1, gained + survives
        return num_tokens, (1 + gained) / (self._costs.plain + self._costs.of_extra(offer.label) * num_tokens)
