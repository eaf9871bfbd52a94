"""How much to draft, and with which drafter, or whether at all: chosen each round from measured costs and acceptance.

Time is the currency. Decoding runs at some rate λ (tokens per millisecond), so one more drafted token pays when the
probability that it will stand is above λ times what it costs. That one comparison decides where a draft ends, how far
known tokens are followed, and whether a drafter is asked at all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from rapid.speculation.draft import DraftLimits, VerifyResult

MAX_DRAFT_TOKENS = 16

_PRIOR_WEIGHT = 2.0  # how many observations a prior is worth
_PLAIN_ROUNDS = 3  # at the start of a request
_HOPE = 0.8  # the acceptance that is promised before there were any rounds
_DECAY = 0.9  # of the running rate, per round
_FIRST_REST, _LONGEST_REST = 48, 192  # rounds without a drafter between two tries, while it does not pay
_DRAFT_MS = 12.0  # a drafted token costs, before any was measured


class Acceptance:
    """P(a drafted token stands | its class), running means that start from a prior.

    A class is an interval of some value that a drafter knows: its confidence, or the length of a match.
    """

    def __init__(self, edges: tuple[float, ...], prior: tuple[float, ...]) -> None:
        self._edges = edges
        self._stood = [p * _PRIOR_WEIGHT for p in prior]
        self._tried = [_PRIOR_WEIGHT] * len(prior)
        self._mean, self._count = _HOPE, _PRIOR_WEIGHT

    def observe(self, value: float, stood: bool) -> None:
        which = bisect_right(self._edges, value)
        self._stood[which] += stood
        self._tried[which] += 1
        self._count += 1
        self._mean += (stood - self._mean) / self._count

    def of(self, value: float) -> float:
        which = bisect_right(self._edges, value)
        return self._stood[which] / self._tried[which]

    def table(self) -> tuple[float, ...]:
        return tuple(stood / tried for stood, tried in zip(self._stood, self._tried, strict=True))

    def mean(self) -> float:
        """Of all classes, as often as they came."""
        return self._mean


@dataclass(frozen=True)
class Offer:
    """What a drafter can bring to the next round, of at most ``max_tokens`` tokens.

    Tokens that are known already cost no draft step: ``known`` has P(token i stands | those before it do) for the first
    of them. Where ``known`` is None the tokens are yet to be drafted, and each costs a step; then ``by_confidence`` is
    P(a token stands) by class of the drafter's confidence, and ``mean`` its mean.
    """

    label: str
    max_tokens: int
    known: tuple[float, ...] | None = None
    by_confidence: tuple[float, ...] = ()
    mean: float = _HOPE


@dataclass
class Costs:
    """Running means, in milliseconds of a request's own time: what its rounds took, messages included.

    ``plain`` is a round without a draft, ``extra`` what verifying one more token adds, and ``draft`` a drafted token by
    the drafter's label. They outlive a request, so that the next one starts from what was measured.
    """

    plain: float = 40.0
    extra: float = 2.0
    draft: dict[str, float] = field(default_factory=dict)

    def copy(self) -> Costs:
        return replace(self, draft=dict(self.draft))

    def of_draft(self, label: str) -> float:
        return self.draft.get(label, _DRAFT_MS)

    def update(self, name: Literal["plain", "extra"], value: float) -> None:
        """Moves a mean towards ``value``."""
        setattr(self, name, _towards(float(getattr(self, name)), value))

    def update_draft(self, label: str, value: float) -> None:
        self.draft[label] = _towards(self.of_draft(label), value)


def _towards(mean: float, value: float) -> float:
    return 0.7 * mean + 0.3 * min(value, 2 * mean)  # a single stall counts as no more than twice what is usual


class RoundPlan(NamedTuple):
    """The next round verifies a draft of the drafter ``source`` within ``limits``, or nothing ("none")."""

    source: str = "none"
    limits: DraftLimits = DraftLimits(0)


PLAIN_ROUND = RoundPlan()


@dataclass
class _Record:
    """One drafter's rounds in this request: tokens and milliseconds, decayed, and how it rests while it does not pay."""

    tokens: float = 0.0
    ms: float = 0.0
    rest: int = _FIRST_REST
    resting: int = 0


class DraftController:
    """One request's choices. ``fixed`` is a given γ, and None chooses.

    A request with a seed of its own must not depend on the clock: with ``timed`` False the costs stay what they are.
    """

    def __init__(self, fixed: int | None, costs: Costs, *, timed: bool = True) -> None:
        self._fixed, self._costs, self._timed = fixed, costs, timed
        self._records: dict[str, _Record] = {}
        self._plain_rounds = 0

    def choose(self, offers: Sequence[Offer]) -> RoundPlan:
        """The best of the ``offers``, or a plain round.

        A fixed γ takes the first offer, whatever it costs.
        """
        if self._fixed is not None:
            if self._fixed == 0 or not offers:
                return PLAIN_ROUND
            return RoundPlan(offers[0].label, DraftLimits(min(self._fixed, offers[0].max_tokens)))
        if self._timed and self._plain_rounds < _PLAIN_ROUNDS:  # what drafting is measured against
            return PLAIN_ROUND
        best, rate = PLAIN_ROUND, 1 / self._costs.plain
        paying = [offer for offer in offers if offer.known is None and self._pays(offer.label)]
        if paying:
            offer = max(paying, key=lambda offer: self._rate(offer.label))
            rate = max(rate, self._rate(offer.label))
            step = self._costs.of_draft(offer.label) + self._costs.extra
            # The acceptance of the next token is known once it is drawn; until then it is as good as the mean.
            floor = min(0.9, rate * step / offer.mean)
            best = RoundPlan(
                offer.label, DraftLimits(min(offer.max_tokens, MAX_DRAFT_TOKENS), floor, offer.by_confidence)
            )
        for offer in offers:
            num_tokens, known_rate = self._follow(offer.known or (), rate)
            if num_tokens and known_rate > rate:
                best, rate = RoundPlan(offer.label, DraftLimits(num_tokens)), known_rate
        return best

    def observe(self, plan: RoundPlan, outcome: VerifyResult, round_ms: float) -> None:
        """What came of a round that took ``round_ms``."""
        num_drafted = outcome.num_drafted
        # A drafter that rested reads what was written meanwhile: that is the price of the rest, not of drafting.
        step_ms = outcome.draft_step_ms or self._costs.of_draft(plan.source)
        catching_up = max(0.0, outcome.draft_ms - num_drafted * step_ms)
        if self._timed:
            self._measure(plan, outcome, round_ms)
        for label, record in self._records.items():
            record.resting = 0 if label == plan.source else record.resting + 1
        if plan.source in self._records:  # drafters of known tokens have none
            record = self._records[plan.source]
            took = round_ms - catching_up if self._timed else self._expected_ms(plan.source, num_drafted)
            record.tokens = _DECAY * record.tokens + outcome.num_accepted + 1
            record.ms = _DECAY * record.ms + took
            if self._rate(plan.source) * self._costs.plain >= 1:
                record.rest = _FIRST_REST

    def _measure(self, plan: RoundPlan, outcome: VerifyResult, round_ms: float) -> None:
        if outcome.num_drafted == 0:
            self._plain_rounds += 1
            self._costs.update("plain", round_ms)
            return
        self._costs.update("extra", max(0.0, round_ms - outcome.draft_ms - self._costs.plain) / outcome.num_drafted)
        if outcome.draft_step_ms:
            self._costs.update_draft(plan.source, outcome.draft_step_ms)

    def _record(self, label: str) -> _Record:
        return self._records.setdefault(label, _Record())

    def _expected_ms(self, label: str, num_drafted: int) -> float:
        return self._costs.plain + num_drafted * (self._costs.of_draft(label) + self._costs.extra)

    def _rate(self, label: str) -> float:
        """Tokens per millisecond of this drafter's rounds; what the priors promise, before there were any."""
        record = self._record(label)
        if record.ms == 0:  # a hopeful promise counts as the first round, so that drafting is tried at all
            record.tokens, record.ms = sum(_HOPE**i for i in range(4)), self._expected_ms(label, 3)
        return record.tokens / record.ms

    def _pays(self, label: str) -> bool:
        if self._rate(label) * self._costs.plain >= 1:
            return True
        record = self._record(label)
        if record.resting < record.rest:
            return False
        record.rest = min(2 * record.rest, _LONGEST_REST)  # try again, and wait longer if that fails too
        record.tokens, record.ms = record.tokens / 2, record.ms / 2
        return True

    def _follow(self, known: tuple[float, ...], rate: float) -> tuple[int, float]:
        """How many known tokens pay, and the rate of a round that verifies them (tokens per millisecond)."""
        survives, gained, num_tokens = 1.0, 0.0, 0
        for acceptance in known[:MAX_DRAFT_TOKENS]:
            survives *= acceptance
            if survives < rate * self._costs.extra:
                break
            num_tokens, gained = num_tokens + 1, gained + survives
        return num_tokens, (1 + gained) / (self._costs.plain + self._costs.extra * num_tokens)
