"""What requests learn of their rounds, and leave to later requests of the same kind: costs and acceptance."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

HOPE = 0.8  # the assumed acceptance before the first round

_PRIOR_WEIGHT = 2.0  # how many observations a prior is worth
_REMEMBERED = 6.0  # how many observations what other requests have seen is worth
_NEWEST = 0.3  # the least weight of a measured draft step
# Shares of a plain round. Before the first measurement: the cost of drafting a token, and of verifying it.
_DRAFT_SHARE, _EXTRA_SHARE = 0.25, 0.06
_GUESS_SPREAD = 1.0  # of an assumed plain round
_NOISE, _DRIFT = 0.15, 0.03  # of one round's time, and of what costs change from one round to the next
_PLAIN = ""  # no drafter's label
_KINDS = 256  # that are remembered


class Acceptance:
    """P(a draft token is accepted | its class), as running means that start from a prior.

    A class is an interval of some value that a drafter knows: its confidence, or the length of a match.
    """

    def __init__(self, edges: tuple[float, ...], prior: tuple[float, ...]) -> None:
        self._edges = edges
        self._stood = [p * _PRIOR_WEIGHT for p in prior]
        self._tried = [_PRIOR_WEIGHT] * len(prior)
        self._mean, self._count = HOPE, _PRIOR_WEIGHT

    def faded(self) -> Acceptance:
        """What another request begins with: the same means, but of few observations."""
        own = copy.copy(self)
        weights = [min(tried, _REMEMBERED) for tried in self._tried]
        own._stood = [weight * p for weight, p in zip(weights, self.table(), strict=True)]
        own._tried, own._count = weights, min(self._count, _REMEMBERED)
        return own

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
        """The mean over all classes, weighted by how often each was observed."""
        return self._mean


@dataclass
class Costs:
    """What rounds cost, in milliseconds of a request's own time, messages and sampling included.

    ``plain`` is the cost of a round without a draft. By a drafter's label, ``extra`` is that of verifying one more
    token, and ``draft`` that of drafting it. ``plain`` and ``extra`` are those of a line through the rounds' times over
    their numbers of draft tokens. A Kalman filter follows it, so the first rounds weigh most, and requests that draft
    every round know what a plain round costs.
    """

    plain: float = 40.0
    extra: dict[str, float] = field(default_factory=dict)
    draft: dict[str, float] = field(default_factory=dict)
    _spread: dict[tuple[str, str], float] = field(default_factory=dict, repr=False)  # covariances, in plain²
    _num_drafts: Counter[str] = field(default_factory=Counter, repr=False)

    def copy(self) -> Costs:
        own = replace(self, extra=dict(self.extra), draft=dict(self.draft))
        own._spread, own._num_drafts = dict(self._spread), self._num_drafts.copy()
        return own

    def assumed(self) -> Costs:
        """The same costs, not as measured but as a first guess."""
        return Costs(self.plain, dict(self.extra), dict(self.draft))

    def of_extra(self, label: str) -> float:
        return self.extra.get(label, _EXTRA_SHARE * self.plain)

    def of_draft(self, label: str) -> float:
        return self.draft.get(label, _DRAFT_SHARE * self.plain)

    def learn_draft(self, label: str, step_ms: float) -> None:
        self._num_drafts[label] += 1
        share, mean = max(_NEWEST, 1 / (1 + self._num_drafts[label] / 2)), self.of_draft(label)
        self.draft[label] = mean + share * (min(step_ms, 2 * mean) - mean)

    def learn_round(self, label: str, num_drafted: int, ms: float) -> None:
        """From a round that took ``ms`` beside drafting, and verified ``num_drafted`` tokens of the drafter ``label``.

        A stall counts at most twice the expected time.
        """
        factors = {_PLAIN: 1.0}
        if num_drafted:
            factors[label] = float(num_drafted)
            self.extra.setdefault(label, self.of_extra(label))
        names, spread = [_PLAIN, *self.extra], self._spread
        for name in names:
            known = spread.get((name, name), _GUESS_SPREAD if name == _PLAIN else _EXTRA_SHARE**2)
            spread[name, name] = known + (_DRIFT if name == _PLAIN else _DRIFT * _EXTRA_SHARE) ** 2
        expected = self.plain + num_drafted * self.extra.get(label, 0.0)
        error = min(ms, 2 * expected) - expected
        moved = {name: sum(f * spread.get((name, other), 0.0) for other, f in factors.items()) for name in names}
        total = sum(f * moved[name] for name, f in factors.items()) + _NOISE**2
        for name in names:
            for other in names:
                spread[name, other] = spread.get((name, other), 0.0) - moved[name] * moved[other] / total
        for name in self.extra:
            self.extra[name] = max(0.0, self.extra[name] + moved[name] / total * error)
        self.plain = max(self.plain / 2, self.plain + moved[_PLAIN] / total * error)


@dataclass
class Learned:
    """One request's costs, and its acceptance by drafter."""

    costs: Costs = field(default_factory=Costs)
    acceptance: dict[str, Acceptance] = field(default_factory=dict)

    def acceptance_of(self, label: str, new: Callable[[], Acceptance]) -> Acceptance:
        """What is known of the drafter ``label``, or a ``new`` prior; the request learns with it."""
        return self.acceptance.setdefault(label, new())

    def faded(self) -> Learned:
        return Learned(self.costs.copy(), {label: each.faded() for label, each in self.acceptance.items()})


class History:
    """What requests of each kind learned last. A kind is what costs and acceptance depend on (`rapid.generate`)."""

    def __init__(self, costs: Costs | None = None) -> None:
        self._latest = costs or Costs()
        self._kinds: dict[Hashable, Learned] = {}

    def of(self, kind: Hashable) -> Learned:
        """What a request of that kind begins with: the costs of the latest request of any kind, if it is the first."""
        known = self._kinds.get(kind)
        if known is None:
            return Learned(self._latest.assumed())
        return known.faded()

    def keep(self, kind: Hashable, learned: Learned) -> None:
        self._kinds.pop(kind, None)  # the latest stands last
        self._kinds[kind], self._latest = learned, learned.costs
        if len(self._kinds) > _KINDS:
            del self._kinds[next(iter(self._kinds))]
