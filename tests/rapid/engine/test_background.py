"""The drafter comes when it comes: what does not wait for it, what does, and what happens when it does not come."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from running import GREEDY, begun, eventually
from world import Retrieval, World, complete, first_eight, greedily, run

from rapid.errors import InvalidRequest, ModelNotFound
from rapid.events import Delta
from rapid.sampling.params import SamplingParams
from rapid.speculation.learned import Costs, History

CHEAP_DRAFTS, DEAR_DRAFTS = (
    Costs(plain=1000.0, draft={"model": 0.1}, extra={"model": 0.1, "lookup": 0.1}),
    Costs(plain=0.1, draft={"model": 1000.0}, extra={"model": 1000.0, "lookup": 1000.0}),
)


@pytest.fixture
def fixed_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured changes nothing."""
    for method in ("learn_round", "learn_draft"):
        monkeypatch.setattr(Costs, method, lambda *_: None)


def sources(deltas: list[Delta]) -> set[str]:
    return {delta.source for delta in deltas}


@pytest.mark.parametrize("strategy", ["speculative", "rapid"])
@pytest.mark.parametrize("costs", [CHEAP_DRAFTS, DEAR_DRAFTS, Costs()])
def test_whoever_drafts_the_greedy_text_is_the_target_s(
    world: World, fixed_costs: None, strategy: str, costs: Costs
) -> None:
    """Plain rounds, looked-up and sampled drafts of changing lengths, in one answer."""
    backend = world.backend()
    backend.history = History(costs)
    completion = run(world.request(strategy=strategy, gamma="auto", max_tokens=80), backend)
    assert completion.tokens == greedily(world.target.model, world.prompt().tokens, 80)
    if costs is CHEAP_DRAFTS:
        assert "model" in sources(completion.deltas)
    if costs is DEAR_DRAFTS:
        assert completion.statistics.drafted < 5  # tried again, and left again


def test_the_text_itself_drafts(world: World, fixed_costs: None) -> None:
    """Greedy texts of tiny models repeat themselves, and then several tokens come from one pass."""
    backend = world.backend()
    backend.history = History(CHEAP_DRAFTS)
    completion = run(world.request(strategy="lookup", gamma="auto", max_tokens=100), backend)
    stats = completion.statistics
    assert completion.tokens == greedily(world.target.model, world.prompt().tokens, 100)
    assert sources(completion.deltas) == {"none", "lookup"}
    assert 0 < stats.lookup_accepted == stats.accepted
    assert stats.rounds < 80
    assert world.drafter.stats().forward_passes == 0


class Slow:
    """A retriever that answers when it is told to."""

    def __init__(self) -> None:
        self.asked, self.may_answer = threading.Event(), threading.Event()

    def __call__(self, *question: Any) -> Retrieval:
        self.asked.set()
        assert self.may_answer.wait(30)
        return first_eight(*question)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(), SamplingParams(temperature=0, seed=1)])
def test_the_answer_does_not_wait_for_the_drafter(world: World, sampling: SamplingParams) -> None:
    retrieve = Slow()

    async def main() -> None:
        completion = await complete(world.request(gamma="auto", sampling=sampling), world.backend(retrieve))
        assert (len(completion.tokens), completion.statistics.fallback) == (12, None)
        assert "model" not in sources(completion.deltas)
        retrieve.may_answer.set()

    asyncio.run(main())
    assert world.num_sequences() == 0


@pytest.mark.parametrize(("gamma", "sampling"), [(3, GREEDY), (3, SamplingParams()), ("auto", SamplingParams(seed=1))])
def test_what_must_be_reproducible_waits_for_the_drafter(
    world: World, gamma: int | str, sampling: SamplingParams
) -> None:
    """A fixed γ, and a seed that is used."""
    retrieve = Slow()

    async def main() -> None:
        reading = asyncio.create_task(complete(world.request(gamma=gamma, sampling=sampling), world.backend(retrieve)))
        await asyncio.to_thread(retrieve.asked.wait, 30)
        await asyncio.to_thread(eventually, lambda: world.target.stats().forward_passes > 0)
        await asyncio.sleep(0.05)
        assert (reading.done(), world.target.stats().forward_passes) == (False, 1)  # the prefill
        retrieve.may_answer.set()
        assert (await reading).statistics.draft_prompt_tokens == 12

    asyncio.run(main())


def test_with_a_seed_what_others_measured_does_not_matter(world: World) -> None:
    request = world.request(gamma="auto", sampling=SamplingParams(seed=1), max_tokens=40)
    texts = []
    for costs in (CHEAP_DRAFTS, DEAR_DRAFTS):
        backend = world.backend()
        backend.history = History(costs)
        texts.append(run(request, backend).tokens)
        assert backend.history.of("any").costs == costs
    assert texts[0] == texts[1]


def test_a_request_leaves_what_it_measured_to_the_next(world: World) -> None:
    backend = world.backend()
    before = backend.history.of("any").costs
    run(world.request(gamma="auto"), backend)
    assert backend.history.of("any").costs.plain != before.plain


# Without a drafter


def no_room(world: World) -> str:
    """Somebody else has all of the drafter's memory."""
    total = world.drafter.stats().kv.bytes_total // world.drafter.model.layout.bytes_per_token
    begun(world.drafter, [1], room=total - 1)
    return "overloaded"


def never_any_room(world: World) -> str:
    """The drafter's memory is too small for the request."""
    world.drafter._pool.num_pages = 1
    return "kv_memory_exceeded"


def not_there(world: World) -> str:
    def absent(*_: Any, **__: Any) -> Any:
        raise ModelNotFound("no such drafter")

    world.drafter.open = absent  # type: ignore[method-assign]
    return "model_not_found"


@pytest.mark.parametrize("gamma", [3, "auto"])
@pytest.mark.parametrize("prevent", [no_room, never_any_room, not_there])
def test_without_a_drafter_the_answer_is_complete_and_says_why(
    world: World, prevent: Callable[[World], str], gamma: int | str
) -> None:
    code = prevent(world)
    held = world.num_sequences()
    for strategy in ("speculative", "rapid"):
        completion = run(world.request(strategy=strategy, gamma=gamma, max_tokens=60), world.backend())
        assert completion.tokens == greedily(world.target.model, world.prompt().tokens, 60)
        assert completion.statistics.fallback == code
        assert "model" not in sources(completion.deltas)
        assert world.num_sequences() == held


def test_a_target_without_room_ever_is_an_error(world: World) -> None:
    world.target._pool.num_pages = 1
    with pytest.raises(InvalidRequest, match="raise kv_memory"):
        run(world.request(), world.backend())
    assert world.num_sequences() == 0


def test_what_is_known_of_a_prompt_is_told(world: World) -> None:
    request = world.request(strategy="autoregressive")
    assert run(request, world.backend()).statistics.cached_tokens == 0
    assert run(request, world.backend()).statistics.cached_tokens == 16
