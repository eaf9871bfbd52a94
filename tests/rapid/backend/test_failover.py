"""Engines that are lost in the middle of an answer: it goes on elsewhere, with not a token lost, doubled or changed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from running import GREEDY
from world import Retrieval, World, complete, first_eight

from rapid.backend import leases
from rapid.backend.local import LocalBackend
from rapid.backend.protocol import Lease, Role
from rapid.drafters import retrieval
from rapid.engine.messages import SequenceRequest
from rapid.errors import DraftLost, EngineLost, Overloaded
from rapid.sampling.noise import Noise, Purpose
from rapid.sampling.params import LogitParams, SamplingParams
from rapid.speculation.draft import Draft
from rapid.strategies import STRATEGIES

Fault = Callable[[Role, str], bool]


class FaultyBackend(LocalBackend):
    """Engines that die when ``fault(role, when)`` says so; ``when`` is opening, prefill, before, after or proposing.

    "before" and "after" are about a verification: a target that dies after it has verified never tells what came of it.
    """

    def __init__(
        self,
        world: World,
        fault: Fault,
        *,
        resume_timeout_s: float = 5.0,
        retrieve: Callable[..., Retrieval] = first_eight,
    ) -> None:
        super().__init__(world.target, world.drafter, retrieve, overlap=True)
        self.resume_timeout_s, self.fault = resume_timeout_s, fault

    @asynccontextmanager
    async def lease(self, role: Role, request: SequenceRequest) -> AsyncIterator[Lease]:
        if self.fault(role, "opening"):
            raise EngineLost("nobody answers")
        async with super().lease(role, request) as lease:
            yield Lease(_FaultyCalls(lease, role, self.fault))


class _FaultyCalls:
    """A lease's calls. Once its engine is dead it stays dead."""

    def __init__(self, lease: Lease, role: Role, fault: Fault) -> None:
        self._lease, self._role, self._fault, self._dead = lease, role, fault, False

    def __call__(self, method: str, *message: Any) -> Awaitable[Any]:
        if method == "propose":
            try:
                self._check("proposing")
            except EngineLost as error:
                failed: asyncio.Future[Draft] = asyncio.get_running_loop().create_future()
                failed.set_exception(error)
                return failed
        if method in ("prefill", "verify"):
            return self._checked(method, *message)
        return self._lease.call(method, *message)

    async def _checked(self, method: str, *message: Any) -> Any:
        self._check("prefill" if method == "prefill" else "before")
        result = await self._lease.call(method, *message)
        if method == "verify":
            self._check("after")
        return result

    def _check(self, when: str) -> None:
        self._dead = self._dead or self._fault(self._role, when)
        if self._dead:
            raise EngineLost("the engine died")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (leases, retrieval):
        monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(leases, "LONGEST_APART_S", 0.0)


def nth(role: Role, when: str, n: int) -> Fault:
    """True once, at the ``n``-th time."""
    seen = iter(range(1000))
    return lambda at, moment: (at, moment) == (role, when) and next(seen) == n


def answer(world: World, fault: Fault, **how: Any) -> Any:
    async def main() -> Any:
        completion = await complete(world.request(**how), FaultyBackend(world, fault))
        assert world.num_sequences() == 0
        return completion

    return asyncio.run(main())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_target_that_dies_in_any_round_changes_nothing(world: World, strategy: str, when: str) -> None:
    expected = asyncio.run(complete(world.request(strategy=strategy), world.backend()))
    for n in range(expected.statistics.rounds):
        resumed = answer(world, nth("target", when, n), strategy=strategy)
        assert resumed.tokens == expected.tokens
        assert resumed.statistics.resumed == 1
        assert resumed.statistics.emitted == len(expected.tokens)


def test_what_another_engine_reads_is_counted_apart(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    took_ms = iter((3.0, 5.0))

    async def timed(self: _FaultyCalls, method: str, *message: Any) -> Any:
        result = await checked(self, method, *message)
        return replace(result, elapsed_ms=next(took_ms)) if method == "prefill" else result

    checked = _FaultyCalls._checked
    monkeypatch.setattr(_FaultyCalls, "_checked", timed)
    times = answer(world, nth("target", "after", 1), strategy="autoregressive").statistics.timings_ms
    assert (times["target_prefill"], times["resuming_prefill"]) == (3.0, 5.0)


def test_penalties_go_on_counting_where_the_target_died(world: World) -> None:
    """What was written before is part of the next engine's prompt, and still counts as written."""
    params = LogitParams(frequency_penalty=1.5, repetition_penalty=1.4)
    expected = asyncio.run(complete(world.request(logits=params), world.backend()))
    assert expected.tokens != asyncio.run(complete(world.request(), world.backend())).tokens
    for n in range(expected.statistics.rounds):
        assert answer(world, nth("target", "after", n), logits=params).tokens == expected.tokens


@pytest.mark.parametrize("when", ["opening", "prefill"])
def test_a_target_that_is_not_there_yet_is_waited_for(world: World, when: str) -> None:
    expected = asyncio.run(complete(world.request(), world.backend()))
    assert answer(world, nth("target", when, 0)).tokens == expected.tokens


def test_two_deaths_in_a_row(world: World) -> None:
    expected = asyncio.run(complete(world.request(), world.backend()))
    first, second = nth("target", "after", 1), nth("target", "prefill", 1)
    resumed = answer(world, lambda role, when: first(role, when) or second(role, when))
    assert (resumed.tokens, resumed.statistics.resumed) == (expected.tokens, 1)


def test_the_search_for_another_target_ends(world: World) -> None:
    dead = nth("target", "before", 1)

    def fault(role: Role, when: str) -> bool:
        gone.append(dead(role, when))
        return any(gone)

    gone: list[bool] = []

    async def main() -> None:
        with pytest.raises(EngineLost):
            await complete(world.request(), FaultyBackend(world, fault, resume_timeout_s=0.05))
        assert world.num_sequences() == 0

    asyncio.run(main())


def test_whoever_has_begun_to_answer_waits_for_room_elsewhere(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = asyncio.run(complete(world.request(), world.backend()))
    backend = FaultyBackend(world, nth("target", "after", 1))
    opened, lease = iter(range(9)), FaultyBackend.lease

    @asynccontextmanager
    async def full(self: FaultyBackend, role: Role, request: SequenceRequest) -> AsyncIterator[Lease]:
        if role == "target" and next(opened) == 1:
            raise Overloaded("no room now")
        async with lease(self, role, request) as leased:
            yield leased

    monkeypatch.setattr(FaultyBackend, "lease", full)
    assert asyncio.run(complete(world.request(), backend)).tokens == expected.tokens


@pytest.mark.parametrize("when", ["opening", "prefill", "proposing"])
@pytest.mark.parametrize("strategy", ["speculative", "rapid"])
def test_a_drafter_that_dies_is_done_without_until_there_is_another(world: World, strategy: str, when: str) -> None:
    expected = asyncio.run(complete(world.request(strategy=strategy, max_tokens=60), world.backend()))
    alone = answer(world, nth("drafter", when, 0), strategy=strategy, max_tokens=60)
    assert alone.tokens == expected.tokens
    assert (alone.statistics.drafters_lost, alone.statistics.fallback) == (int(when == "proposing"), None)
    assert alone.deltas[-2].source != "none"  # drafting has come back


@pytest.mark.parametrize(("retriever", "drafter"), [("dies", "lives"), ("lives", "dies")])
def test_what_drafts_need_is_tried_again_and_no_more_than_that(world: World, retriever: str, drafter: str) -> None:
    """Of retriever and drafter the first two tries fail. A context that was retrieved is not retrieved again."""
    expected = asyncio.run(complete(world.request(strategy="speculative", max_tokens=60), world.backend()))
    asked, opened = iter(range(1000)), iter(range(1000))

    def retrieve(*question: Any) -> Retrieval:
        if next(asked) < 2 and retriever == "dies":
            raise LookupError("the store is down")
        return first_eight(*question)

    def fault(role: Role, when: str) -> bool:
        return (role, when) == ("drafter", "opening") and next(opened) < 2 and drafter == "dies"

    backend = FaultyBackend(world, fault, retrieve=retrieve)
    answer = asyncio.run(complete(world.request(strategy="speculative", max_tokens=60), backend))
    assert answer.tokens == expected.tokens
    assert (answer.statistics.fallback, answer.deltas[-2].source) == (None, "model")
    assert (next(asked), next(opened)) == (3 if retriever == "dies" else 1, 3 if drafter == "dies" else 1)


def test_a_draft_that_was_lost_is_told_from_a_lost_target() -> None:
    assert not issubclass(DraftLost, EngineLost)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_random_numbers_go_on_where_a_target_died(world: World, strategy: str, when: str) -> None:
    """A sampled text with a seed is the same, too: no number comes again for another position, and none is left out."""
    sampling = SamplingParams(seed=7)
    expected = asyncio.run(complete(world.request(strategy=strategy, sampling=sampling), world.backend()))
    for n in range(expected.statistics.rounds):
        resumed = answer(world, nth("target", when, n), strategy=strategy, sampling=sampling)
        assert resumed.tokens == expected.tokens


@pytest.mark.parametrize(("role", "when"), [("target", "after"), ("drafter", "proposing")])
def test_random_numbers_do_not_come_again_after_a_death(
    world: World, role: Role, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per seed, each position has one key for each purpose, and a draft's position one for each round."""
    drawn: dict[int, set[tuple[int, int, int]]] = {}
    keys = Noise.keys

    def noting(self: Noise, purpose: Purpose, steps: torch.Tensor) -> torch.Tensor:
        result = keys(self, purpose, steps)
        # One request, as seeds and starts of one row.
        for step, key in zip(steps.flatten().tolist(), result.flatten().tolist(), strict=True):
            drawn.setdefault(key, set()).add((int(self._hashed), purpose, int(self._start) + step))
        return result

    monkeypatch.setattr(Noise, "keys", noting)
    request = world.request(sampling=SamplingParams(seed=7), max_tokens=60)
    asyncio.run(complete(request, FaultyBackend(world, nth(role, when, 2))))
    assert len(drawn) > 60
    assert all(len(draws) == 1 for draws in drawn.values())
    assert len({seed for draws in drawn.values() for seed, _, _ in draws}) == 2  # the target's and the drafter's


def test_any_engine_may_die_at_any_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (leases, retrieval):
        monkeypatch.setattr(module, "MAX_RESUMPTIONS", 1000)  # chance lets some die again before the next token
    chance = random.Random(1)
    expected = asyncio.run(complete(world.request(max_tokens=60, sampling=GREEDY), world.backend()))
    for _ in range(20):
        survivor = answer(world, lambda *_: chance.random() < 0.1, max_tokens=60)
        assert survivor.tokens == expected.tokens
