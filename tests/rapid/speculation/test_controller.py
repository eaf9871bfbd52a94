"""How much is drafted, from whom, and when not at all."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest

from rapid.drafters.lookup import MATCH_LENGTHS, MATCH_PRIOR
from rapid.drafters.sampling import CONFIDENCE_PRIOR
from rapid.speculation.controller import MAX_DRAFT_TOKENS, DraftController, Offer, RoundPlan
from rapid.speculation.draft import CONFIDENCES, DraftLimits
from rapid.speculation.learned import Acceptance, Costs, History, Learned

FOUND = (5, list(range(100, 140)))


class Outcome(NamedTuple):
    num_drafted: int
    num_accepted: int
    confidences: list[float]
    draft_ms: float
    draft_step_ms: float
    num_sequences: int = 1
    num_pass_drafted: int = 0
    num_draft_sequences: int = 1


class Request:
    """A request's controller, with a drafter model and a lookup that offer what they have learnt."""

    def __init__(self, fixed: int | None, costs: Costs, *, timed: bool = True) -> None:
        self._controller = DraftController(fixed, costs, timed=timed)
        self._by_confidence = Acceptance(CONFIDENCES, CONFIDENCE_PRIOR)
        self._by_match = Acceptance(MATCH_LENGTHS, MATCH_PRIOR)

    def plan(self, room: int, *, can_draft: bool, found: tuple[int, list[int]] | None = None) -> RoundPlan:
        offers = []
        if can_draft and room > 0:
            table, mean = self._by_confidence.table(), self._by_confidence.mean()
            offers.append(Offer("model", room, by_confidence=table, mean=mean))
        if found and room > 0:
            num_tokens = len(found[1][:room])
            known = tuple(self._by_match.of(found[0] + i) for i in range(min(num_tokens, MAX_DRAFT_TOKENS)))
            offers.append(Offer("lookup", num_tokens, known=known))
        return self._controller.choose(offers)

    def observe(self, plan: RoundPlan, outcome: Outcome, round_ms: float, *, match_length: int) -> None:
        for i, confidence in enumerate(outcome.confidences[: outcome.num_accepted + 1]):
            if plan.source == "lookup":
                self._by_match.observe(match_length + i, i < outcome.num_accepted)
            else:
                self._by_confidence.observe(confidence, i < outcome.num_accepted)
        self._controller.observe(plan, outcome, round_ms)  # type: ignore[arg-type]


class World(NamedTuple):
    """What rounds really cost, and how many tokens of a draft of γ stand."""

    plain: float = 40.0
    draft: float = 5.0
    extra: float = 1.0
    catching_up: float = 0.0
    accepts: Callable[[int], int] = lambda gamma: gamma
    confidence: float = 0.99

    def play(self, controller: Request, plan: RoundPlan, *, match_length: int = 0) -> None:
        """Runs the planned round; a drafter that is sure drafts all it may."""
        gamma = plan.limits.max_tokens
        draft_ms = gamma * self.draft + self.catching_up if plan.source == "model" else 0.0
        accepted = self.accepts(gamma)
        outcome = Outcome(gamma, accepted, [self.confidence] * gamma, draft_ms, self.draft if draft_ms else 0.0)
        controller.observe(plan, outcome, self.plain + draft_ms + gamma * self.extra, match_length=match_length)

    def sources(self, controller: Request, num_rounds: int) -> list[str]:
        sources = []
        for _ in range(num_rounds):
            plan = controller.plan(100, can_draft=True)
            self.play(controller, plan)
            sources.append(plan.source)
        return sources


GOOD, BAD = World(), World(draft=30.0, accepts=lambda gamma: 0)


def test_a_fixed_number_is_drafted_every_round_as_far_as_there_is_room() -> None:
    controller = Request(5, Costs(plain=1.0, draft={"model": 1000.0}))  # whatever it costs
    for _ in range(20):
        plan = controller.plan(100, can_draft=True, found=FOUND)
        assert plan == RoundPlan("model", DraftLimits(5))
        assert not plan.limits.stop_after([0.001] * 4)
        BAD.play(controller, plan)
    assert controller.plan(3, can_draft=True) == RoundPlan("model", DraftLimits(3))
    assert controller.plan(0, can_draft=True, found=FOUND).source == "none"
    assert controller.plan(100, can_draft=False, found=FOUND) == RoundPlan("lookup", DraftLimits(5))
    assert controller.plan(100, can_draft=False).source == "none"
    assert Request(0, Costs()).plan(100, can_draft=True, found=FOUND).source == "none"


def test_plain_rounds_come_first_to_compare_with() -> None:
    sources = GOOD.sources(Request(None, Costs()), 10)
    assert sources[0] == "none"
    assert sources[-1] == "model"


@pytest.mark.parametrize("world", [GOOD, World(accepts=lambda gamma: gamma // 2), World(catching_up=500.0)])
def test_drafting_that_pays_goes_on(world: World) -> None:
    """Also where much had to be read once to catch up: that is not what a draft costs."""
    assert set(world.sources(Request(None, Costs()), 200)[10:]) == {"model"}


def test_drafting_that_does_not_pay_stops_and_is_tried_again_more_and_more_rarely() -> None:
    sources = BAD.sources(Request(None, Costs()), 1500)
    tried = [i for i, source in enumerate(sources) if source == "model"]
    rests = [after - before for before, after in pairwise(tried) if after - before > 1]
    assert len(tried) < 40
    assert len(rests) >= 4
    assert rests[0] < rests[-1] <= 300
    assert rests == sorted(rests)


def test_a_drafter_that_gets_better_is_taken_back() -> None:
    controller = Request(None, Costs())
    assert BAD.sources(controller, 200)[-1] == "none"
    assert GOOD.sources(controller, 1000)[-100:] == ["model"] * 100


def test_nothing_is_drafted_without_a_drafter_or_room() -> None:
    controller = Request(None, Costs())
    GOOD.sources(controller, 10)
    assert controller.plan(100, can_draft=False).source == "none"
    assert controller.plan(0, can_draft=True, found=FOUND).source == "none"
    assert controller.plan(2, can_draft=True).limits.max_tokens == 2
    assert controller.plan(1000, can_draft=True).limits.max_tokens == MAX_DRAFT_TOKENS


def test_a_draft_ends_where_its_next_token_would_hardly_stand() -> None:
    table = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # by confidence, the least first
    limits = DraftLimits(8, floor=0.5, acceptance=table)
    assert not limits.stop_after([0.99] * 6)  # 0.9 to the power of 6 is 0.53
    assert limits.stop_after([0.99] * 7)
    assert limits.stop_after([0.05])
    assert limits.stop_after([0.99, 0.5])
    assert not DraftLimits(8, floor=0.0, acceptance=table).stop_after([0.05] * 8)


def test_dear_drafts_end_earlier_than_cheap_ones() -> None:
    def length(costs: Costs) -> int:
        limits = Request(None, costs, timed=False).plan(100, can_draft=True).limits
        return next(n for n in range(1, 100) if n == limits.max_tokens or limits.stop_after([0.7] * n))

    assert 1 <= length(Costs(draft={"model": 12.0})) < length(Costs(draft={"model": 1.0}, extra={"model": 0.2}))


def test_what_is_looked_up_is_followed_further_the_longer_its_match() -> None:
    def followed(match_length: int) -> int:
        controller = Request(None, Costs(plain=40.0, extra={"lookup": 10.0}), timed=False)
        plan = controller.plan(100, can_draft=False, found=(match_length, FOUND[1]))
        return plan.limits.max_tokens

    lengths = [followed(match_length) for match_length in (3, 5, 8, 12, 20, 32)]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1] <= MAX_DRAFT_TOKENS


def test_a_lookup_costs_nothing_to_draft_and_is_taken_where_it_promises_more() -> None:
    controller = Request(None, Costs(draft={"model": 12.0}), timed=False)
    assert controller.plan(100, can_draft=True, found=(32, FOUND[1])).source == "lookup"
    assert controller.plan(2, can_draft=True, found=(32, FOUND[1])) == RoundPlan("lookup", DraftLimits(2))


def test_lookups_that_never_stand_are_no_longer_followed() -> None:
    controller, wrong = Request(None, Costs(extra={"lookup": 10.0}), timed=False), World(accepts=lambda gamma: 0)
    for _ in range(60):
        plan = controller.plan(100, can_draft=False, found=FOUND)
        if plan.source == "none":
            return
        wrong.play(controller, plan, match_length=FOUND[0])
    pytest.fail("still followed")


def test_with_a_seed_plans_do_not_depend_on_the_clock() -> None:
    """The same outcomes at another speed lead to the same plans."""
    quick, slow = (Request(None, Costs(), timed=False) for _ in range(2))
    fast_world = World(plain=1.0, draft=0.01, accepts=lambda gamma: gamma // 3)
    slow_world = World(plain=100.0, draft=90.0, catching_up=50.0, accepts=lambda gamma: gamma // 3)
    sources = set()
    for i in range(300):
        found = (3 + i % 7, FOUND[1]) if i % 3 == 0 else None
        plans = [controller.plan(100, can_draft=True, found=found) for controller in (quick, slow)]
        assert plans[0] == plans[1]
        sources.add(plans[0].source)
        match_length = found[0] if found else 0
        fast_world.play(quick, plans[0], match_length=match_length)
        slow_world.play(slow, plans[1], match_length=match_length)
    assert sources >= {"model", "lookup"}


def test_costs_follow_what_is_measured_and_one_stall_hardly_moves_them() -> None:
    costs = Costs(plain=40.0)
    costs.learn_round("", 0, 100_000.0)
    assert costs.plain <= 80
    for _ in range(60):
        costs.learn_round("", 0, 20.0)
    assert costs.plain == pytest.approx(20.0, rel=0.01)


def test_the_first_measurements_weigh_most() -> None:
    """Three plain rounds come first, and what a draft costs is compared with them: the assumed cost must be gone."""
    costs = Costs(plain=40.0)
    for _ in range(3):
        costs.learn_round("", 0, 10.0)
    assert costs.plain < 14


def test_a_plain_round_s_cost_follows_the_machine_where_every_round_drafts() -> None:
    """Drafts of changing lengths: what a token more costs is found as well."""
    costs = Costs(plain=20.0, extra={"model": 1.0})
    for i in range(400):
        costs.learn_round("model", 1 + i % 5, 30.0 + 1.5 * (1 + i % 5))
    assert costs.plain == pytest.approx(30.0, rel=0.05)
    assert costs.of_extra("model") == pytest.approx(1.5, rel=0.3)
    assert costs.of_extra("lookup") != costs.of_extra("model")


def test_a_request_begins_with_what_its_kind_has_learnt() -> None:
    history = History()
    penalised, other = history.of("penalised"), history.of("other")
    for _ in range(20):
        penalised.costs.learn_round("", 0, 25.0)
        other.costs.learn_round("", 0, 12.0)
        penalised.acceptance_of("model", lambda: Acceptance((0.5,), (0.3, 0.9))).observe(0.9, False)
    history.keep("penalised", penalised)
    history.keep("other", other)
    again = history.of("penalised")
    assert again.costs.plain == pytest.approx(25.0, rel=0.05)
    acceptance = again.acceptance_of("model", lambda: Acceptance((0.5,), (0.3, 0.9)))
    assert acceptance.of(0.9) == pytest.approx(penalised.acceptance["model"].of(0.9))
    assert acceptance.of(0.9) < 0.1
    for _ in range(6):
        acceptance.observe(0.9, True)
    assert acceptance.of(0.9) > 0.4  # what others saw is worth a few observations
    assert penalised.acceptance["model"].of(0.9) < 0.1
    new = history.of("new")
    assert new.costs.plain == other.costs.plain and not new.acceptance
    new.costs.learn_round("", 0, 6.0)
    assert new.costs.plain < 9  # another kind's cost weighs as little as an assumed one
    assert isinstance(history.of("penalised"), Learned)


def test_a_token_must_pay_for_all_who_wait_for_it() -> None:
    """Eight sequences verify in one pass. Its cost is known from all of its draft tokens, whoever drafted them."""

    def longest(num_sequences: int) -> tuple[int, Costs]:
        costs = Costs(plain=40.0, draft={"model": 2.0}, extra={"model": 1.0, "lookup": 1.0})
        controller = DraftController(None, costs, shares_device=True)
        for _ in range(40):
            drafted = 3 * num_sequences
            outcome = Outcome(3, 3, [0.9] * 3, 6.0, 2.0, num_sequences, drafted, num_sequences)
            controller.observe(RoundPlan("model"), outcome, 46.0 + drafted)  # type: ignore[arg-type]
        for _ in range(3):
            controller.observe(RoundPlan(), Outcome(0, 0, [], 0.0, 0.0, num_sequences), 40.0)  # type: ignore[arg-type]
        plan = controller.choose([Offer("lookup", 16, known=(0.8,) * 16)])
        return plan.limits.max_tokens, costs

    (alone, own), (beside, shared) = longest(1), longest(8)
    assert own.of_extra("model") == pytest.approx(1.0, rel=0.2)
    assert shared.of_extra("model") == pytest.approx(1.0, rel=0.2)
    assert 1 <= beside < alone


def test_acceptance_is_learnt_class_by_class() -> None:
    acceptance = Acceptance((0.5,), (0.3, 0.9))
    for _ in range(200):
        acceptance.observe(0.2, True)
        acceptance.observe(0.8, False)
    low, high = acceptance.table()
    assert (acceptance.of(0.2), acceptance.of(0.8)) == (low, high)
    assert low > 0.95 and high < 0.05
    assert acceptance.mean() == pytest.approx(0.5, abs=0.05)


def test_with_a_q_for_every_position_no_round_is_plain_and_one_step_belongs_to_each() -> None:
    """γ is chosen as always. The draft has one token more, whose step is a part of a round's own cost."""
    offer = Offer("model", 10, by_confidence=(0.9,) * 9, mean=0.9)
    for fixed, room, expected in ((0, 10, 1), (4, 10, 5), (4, 2, 3), (4, 0, 1), (None, 0, 1)):
        controller = DraftController(fixed, Costs(), every_position=True)
        plan = controller.choose([replace(offer, max_tokens=room)])
        assert (plan.source, plan.limits.max_tokens) == ("model", expected)
    assert DraftController(4, Costs(), every_position=True).choose([]).source == "none"  # there is no drafter

    costs = Costs()
    controller = DraftController(None, costs, every_position=True)
    step, verifying, extra = 5.0, 40.0, 1.0
    for _ in range(60):
        gamma = controller.choose([offer]).limits.max_tokens - 1
        draft_ms = (gamma + 1) * step
        outcome = Outcome(gamma, gamma, [0.9] * gamma, draft_ms, step)
        plan = RoundPlan("model", DraftLimits(gamma + 1))
        controller.observe(plan, outcome, verifying + draft_ms + gamma * extra)  # type: ignore[arg-type]
    assert costs.plain == pytest.approx(verifying + step, rel=0.05)
    assert costs.of_extra("model") == pytest.approx(extra, abs=0.3)
    assert gamma == 10 or gamma == MAX_DRAFT_TOKENS
