"""How much to draft, from whom, and whether at all: chosen each round from measured costs and acceptance.

Time is the currency. Decoding runs at some rate λ (tokens per millisecond), so one more drafted token pays when the
probability that it will stand is above λ times what it costs. That one comparison decides where a draft ends, how far a
looked-up continuation is followed, and whether the drafter is asked at all.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from rapid.speculation.draft import _CONFIDENCES, DraftLimits

if TYPE_CHECKING:
    from rapid.speculation.draft import VerifyResult

MAX_DRAFT_TOKENS = 16

_MATCHES = (4, 6, 9, 14, 24)
_CONFIDENCE_PRIOR = (0.45, 0.5, 0.55, 0.6, 0.7, 0.78, 0.85, 0.9, 0.96)
_MATCH_PRIOR = (0.3, 0.45, 0.55, 0.65, 0.75, 0.9)
_PRIOR_WEIGHT = 2.0  # how many observations a prior is worth
_PLAIN_ROUNDS = 3  # at the start of a request
_HOPE = 0.8  # the acceptance that is promised before there were any rounds
_DECAY = 0.9  # of the running rate, per round
_FIRST_REST, _LONGEST_REST = 48, 192  # rounds without the drafter between two tries, while it does not pay

Source = Literal["none", "model", "lookup"]


class Acceptance:
    """P(a drafted token stands | its class), running means that start from a prior."""

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


@dataclass
class Costs:
    """Running means, in milliseconds of a request's own time: what its rounds took, messages included.

    ``plain`` is a round without a draft, ``draft`` a drafted token, ``extra`` what verifying one more token adds. They
    outlive a request, so that the next one starts from what was measured.
    """

    plain: float = 40.0
    draft: float = 12.0
    extra: float = 2.0

    def update(self, name: Literal["plain", "draft", "extra"], value: float) -> None:
        """Moves a mean towards ``value``; a single stall counts as no more than twice what is usual."""
        mean = float(getattr(self, name))
        setattr(self, name, 0.7 * mean + 0.3 * min(value, 2 * mean))


class RoundPlan(NamedTuple):
    """What the next round verifies: nothing, the model drafter's tokens within ``limits``, or looked-up ``tokens``."""

    source: Source
    limits: DraftLimits = DraftLimits(0)
    tokens: tuple[int, ...] = ()


class DraftController:
    """One request's choices. ``fixed`` is a given γ, and None chooses.

    A request with a seed of its own must not depend on the clock: with ``timed`` False the costs stay what they are.
    """

    def __init__(self, fixed: int | None, costs: Costs, *, timed: bool = True) -> None:
        self._fixed, self._costs, self._timed = fixed, costs, timed
        self._by_confidence = Acceptance(_CONFIDENCES, _CONFIDENCE_PRIOR)
        self._by_match = Acceptance(_MATCHES, _MATCH_PRIOR)
        self._tokens = self._time = 0.0  # of drafted rounds, decayed
        self._rest, self._resting = _FIRST_REST, 0
        self._plain_rounds = 0

    def plan(self, room: int, *, can_draft: bool, found: tuple[int, list[int]] | None = None) -> RoundPlan:
        """The next round, which may draft up to ``room`` tokens.

        ``found`` is (length of the match, tokens that followed it) of a lookup.
        """
        if self._fixed is not None:
            gamma = min(self._fixed, room)
            if can_draft and gamma > 0:
                return RoundPlan("model", DraftLimits(gamma))
            return RoundPlan("lookup", tokens=tuple(found[1][:gamma])) if found and gamma > 0 else RoundPlan("none")
        if self._timed and self._plain_rounds < _PLAIN_ROUNDS:  # what drafting is measured against
            return RoundPlan("none")
        plain_rate = 1 / self._costs.plain
        drafting = can_draft and room > 0 and self._drafting_pays()
        rate = max(plain_rate, self._draft_rate() if drafting else 0.0)
        if found is not None:
            tokens, gained = self._follow(found[0], found[1][:room], rate)
            if tokens and (1 + gained) / (self._costs.plain + self._costs.extra * len(tokens)) > rate:
                return RoundPlan("lookup", tokens=tuple(tokens))
        if not drafting:
            return RoundPlan("none")
        # What is expected of the next token is only known once it is drawn; until then it is as good as the mean.
        floor = min(0.9, rate * (self._costs.draft + self._costs.extra) / self._by_confidence.mean())
        return RoundPlan("model", DraftLimits(min(room, MAX_DRAFT_TOKENS), floor, self._by_confidence.table()))

    def observe(self, plan: RoundPlan, outcome: VerifyResult, round_ms: float, *, match_length: int = 0) -> None:
        """What came of a round that took ``round_ms``; ``match_length`` is of the lookup it followed."""
        num_drafted, num_accepted = outcome.num_drafted, outcome.num_accepted
        for i, confidence in enumerate(outcome.confidences[: num_accepted + 1]):
            if plan.source == "lookup":
                self._by_match.observe(match_length + i, i < num_accepted)
            else:
                self._by_confidence.observe(confidence, i < num_accepted)
        # Reading what was emitted without the drafter is the price of having let it rest, not of drafting.
        step_ms = outcome.draft_step_ms or self._costs.draft
        catching_up = max(0.0, outcome.draft_ms - num_drafted * step_ms)
        if self._timed:
            self._measure(plan, num_drafted, outcome, round_ms)
        if plan.source == "model":
            took = round_ms - catching_up if self._timed else self._expected_ms(num_drafted)
            self._tokens = _DECAY * self._tokens + num_accepted + 1
            self._time = _DECAY * self._time + took
            self._resting = 0
            if self._draft_rate() * self._costs.plain >= 1:
                self._rest = _FIRST_REST
        else:
            self._resting += 1

    def _measure(self, plan: RoundPlan, num_drafted: int, outcome: VerifyResult, round_ms: float) -> None:
        if num_drafted == 0:
            self._plain_rounds += 1
            self._costs.update("plain", round_ms)
            return
        self._costs.update("extra", max(0.0, round_ms - outcome.draft_ms - self._costs.plain) / num_drafted)
        if outcome.draft_step_ms:
            self._costs.update("draft", outcome.draft_step_ms)

    def _expected_ms(self, num_drafted: int) -> float:
        return self._costs.plain + num_drafted * (self._costs.draft + self._costs.extra)

    def _draft_rate(self) -> float:
        """Tokens per millisecond of rounds with the drafter; what the priors promise, before there were any."""
        if self._time == 0:  # a hopeful promise counts as the first round, so that drafting is tried at all
            self._tokens, self._time = sum(_HOPE**i for i in range(4)), self._expected_ms(3)
        return self._tokens / self._time

    def _drafting_pays(self) -> bool:
        if self._draft_rate() * self._costs.plain >= 1:
            return True
        if self._resting < self._rest:
            return False
        self._rest = min(2 * self._rest, _LONGEST_REST)  # try again, and wait longer if that fails too
        self._tokens, self._time = self._tokens / 2, self._time / 2
        return True

    def _follow(self, match_length: int, tokens: list[int], rate: float) -> tuple[list[int], float]:
        """How far a looked-up continuation pays, and how many of its tokens are expected to stand."""
        survives, gained = 1.0, 0.0
        for i in range(min(len(tokens), MAX_DRAFT_TOKENS)):
            survives *= self._by_match.of(match_length + i)
            if survives < rate * self._costs.extra:
                return tokens[:i], gained
            gained += survives
        return tokens[:MAX_DRAFT_TOKENS], gained
