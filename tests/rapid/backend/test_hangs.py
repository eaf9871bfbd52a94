"""Engines and retrievers that hang instead of dying: every wait ends, and the next request does not wait again."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from world import Completion, Retrieval, World, complete, first_eight

from rapid.backend import breaker, leases, local, waiting
from rapid.backend.breaker import Breaker
from rapid.backend.local import LocalBackend
from rapid.backend.protocol import Lease, Role
from rapid.backend.quarantine import QUARANTINE_S, Quarantine
from rapid.engine import messages
from rapid.engine.messages import Pulse, SequenceRequest
from rapid.errors import EngineHung, EngineLost, Overloaded, RequestQuarantined
from rapid.kernels import compiling
from rapid.prompt_logprobs import prompt_logprobs
from rapid.sampling.params import SamplingParams

SLOW_PASS_S, COMPILING_S = 0.1, 2.5
LIMIT_S = 30.0  # of a test: a wait without an end would take for ever


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LATE", 0.04)
    monkeypatch.setattr(local, "TARGET_PATIENCE_S", 0.5)
    monkeypatch.setattr(leases, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(leases, "LONGEST_APART_S", 0.0)


class HangingBackend(LocalBackend):
    """Calls of ``method`` to the engine in ``role`` are never answered while ``num_hangs`` last, and no pulse then."""

    def __init__(self, world: World, role: Role, method: str, num_hangs: int) -> None:
        super().__init__(world.target, world.drafter, first_eight)
        self.resume_timeout_s = 5.0
        self._role, self._method, self.num_left = role, method, num_hangs
        self.num_leases = 0

    @asynccontextmanager
    async def lease(self, role: Role, request: SequenceRequest) -> AsyncIterator[Lease]:
        async with super().lease(role, request) as lease:
            self.num_leases += role == self._role
            yield lease.over(self._calls(lease, role))

    def _calls(self, lease: Lease, role: Role) -> Callable[..., Awaitable[Any]]:
        hangs = False

        def call(method: str, *message: Any) -> Awaitable[Any]:
            nonlocal hangs
            if (role, method) == (self._role, self._method) and self.num_left:
                self.num_left, hangs = self.num_left - 1, True
            return asyncio.get_running_loop().create_future() if hangs else lease.call(method, *message)

        return call


def answered(world: World, backend: LocalBackend, **how: Any) -> Completion:
    async def main() -> Completion:
        async with asyncio.timeout(LIMIT_S):
            completion = await complete(world.request(**how), backend)
        assert world.num_sequences() == 0
        return completion

    return asyncio.run(main())


@pytest.mark.parametrize("method", ["prefill", "verify"])
def test_a_target_that_hangs_counts_as_dead(world: World, method: str) -> None:
    expected = answered(world, world.backend())
    resumed = answered(world, HangingBackend(world, "target", method, num_hangs=1))
    assert (resumed.tokens, resumed.statistics.resumed) == (expected.tokens, int(method == "verify"))


@pytest.mark.parametrize("method", ["prefill", "propose"])
def test_a_drafter_that_hangs_costs_one_request_a_moment_and_the_next_nothing(
    world: World, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE_S", LIMIT_S)
    expected = answered(world, world.backend())
    backend = HangingBackend(world, "drafter", method, num_hangs=1000)
    for _ in range(2):
        alone = answered(world, backend, strategy="speculative")
        assert (alone.tokens, alone.statistics.drafted) == (expected.tokens, 0)
        assert alone.statistics.fallback in ("engine_hung", "drafter_lost")
    assert backend.num_leases == 1  # none by the second request

    backend.num_left = 0
    backend._drafting._next_try = 0.0  # the pause is over
    for _ in range(2):
        assert answered(world, backend, strategy="speculative").statistics.drafted


@pytest.fixture
def hung(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A forward pass of the target that does not return until the event is set; ``arrived`` says that it began."""
    going_on = threading.Event()
    forward = world.target.model.forward

    def hangs(*args: Any, **options: Any) -> Any:
        assert going_on.wait(LIMIT_S)
        return forward(*args, **options)

    monkeypatch.setattr(messages, "_UNKNOWN_PASS_S", 0.5)
    monkeypatch.setattr(world.target.model, "forward", hangs)
    yield going_on
    going_on.set()


def test_a_pass_that_never_returns_ends_the_request_and_not_the_wait(world: World, hung: threading.Event) -> None:
    async def main() -> None:
        async with asyncio.timeout(LIMIT_S):
            for asked in range(2):  # the second waits for a place in an engine that hangs
                with pytest.raises(EngineHung, match="stuck in one pass"):
                    await complete(world.request(strategy="autoregressive"), world.backend())
                assert world.target.stats().pulse.pass_age_s > 0.5, asked
            hung.set()
            assert (await complete(world.request(), world.backend())).tokens

    asyncio.run(main())


def test_a_pass_is_stuck_when_it_is_older_than_expected_by_far() -> None:
    assert Pulse(3.9, 0.01).is_stuck(4.0) is False
    assert Pulse(4.1, 0.01).is_stuck(4.0) is True
    assert Pulse(9.0, 1.0).is_stuck(4.0) is False  # such passes of this engine take a second
    assert Pulse(59.0, None).is_stuck(4.0) is False and Pulse(61.0, None).is_stuck(4.0) is True


def test_an_engine_tells_how_long_its_passes_should_take(world: World) -> None:
    answered(world, world.backend(), max_tokens=30)
    pulse = world.target.pulse()
    assert pulse.pass_age_s == 0 and pulse.expected_s is not None and 0 < pulse.expected_s < LIMIT_S


@pytest.fixture
def slow(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """An engine whose passes take far longer than its requests have patience; says what happens in the next one."""
    forward, happening, going_on = world.target.model.forward, "nothing", threading.Event()

    def passes(*args: Any, **options: Any) -> Any:
        nonlocal happening
        what, happening = happening, "nothing"
        time.sleep(SLOW_PASS_S)
        if what == "a kernel is compiled":
            compiling.begins()
        if what != "nothing":
            going_on.wait(COMPILING_S)
        return forward(*args, **options)

    def happens(what: str) -> None:
        nonlocal happening
        happening = what

    monkeypatch.setattr(local, "TARGET_PATIENCE_S", SLOW_PASS_S / 4)
    monkeypatch.setattr(world.target.model, "forward", passes)
    yield happens
    going_on.set()


def test_passes_that_are_always_slow_and_a_kernel_that_is_compiled_are_waited_for(
    world: World, slow: Callable[[str], None]
) -> None:
    """The pass that compiles takes many times as long as expected; so does one that hangs, which is noticed."""
    how = {"strategy": "autoregressive", "max_tokens": 10}
    assert answered(world, world.backend(), **how).tokens  # among its passes are all that read the prompt
    slow("a kernel is compiled")
    assert answered(world, world.backend(), **how).tokens
    slow("a hang")
    with pytest.raises(EngineHung, match="stuck in one pass"):
        answered(world, world.backend(), **how)


def test_an_answer_that_never_comes_from_an_engine_that_works_has_a_limit() -> None:
    async def main() -> None:
        async def pulse() -> Pulse:
            return Pulse(0.0, None)

        never = asyncio.get_running_loop().create_future()
        with pytest.raises(EngineHung, match="has not answered for 0 s"):
            await waiting.while_it_goes_on(never, pulse, patience_s=LIMIT_S, limit_s=0.1)
        assert never.cancelled()

    asyncio.run(main())


@pytest.mark.parametrize("strategy", ["speculative", "rag"])
def test_a_retriever_that_hangs_is_asked_by_one_request(
    world: World, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "retrieval_limit_s", lambda _: 0.1)
    monkeypatch.setattr(breaker, "FIRST_PAUSE_S", LIMIT_S)
    asked, going_on = iter(range(9)), threading.Event()

    def hangs(*question: Any) -> Retrieval:
        next(asked)
        assert going_on.wait(LIMIT_S)
        return first_eight(*question)

    backend = world.backend(hangs)

    async def main() -> None:
        expected = await complete(world.request(strategy="autoregressive"), world.backend())
        for _ in range(2):
            plain = await complete(world.request(strategy=strategy), backend)
            assert (plain.tokens, plain.statistics.fallback) == (expected.tokens, "retrieval_failed")
        going_on.set()

    asyncio.run(main())
    assert next(asked) == 1


def test_a_request_that_ends_its_engines_is_resumed_twice_and_then_refused(world: World) -> None:
    backend = HangingBackend(world, "target", "verify", num_hangs=1000)

    async def main() -> None:
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(RequestQuarantined, match="3 engines were lost one after another without a token"):
                await complete(world.request(), backend)
            assert backend.num_leases == 3
            with pytest.raises(RequestQuarantined, match="refused for another"):
                await complete(world.request(), backend)
            assert backend.num_leases == 3
            backend.num_left = 0
            assert await complete(world.request(prompt=world.prompt("abc")), backend)  # others are answered

    asyncio.run(main())


def test_a_prompt_that_ends_engines_when_it_is_scored_is_refused_and_no_other(world: World) -> None:
    """A sequence that is scored is opened with one token, which many prompts begin with."""
    backend = HangingBackend(world, "target", "score", num_hangs=3)
    mine, others = world.prompt("abcab"), world.prompt("abcac")
    assert mine.tokens[0] == others.tokens[0]

    async def main() -> None:
        async with asyncio.timeout(LIMIT_S):
            for how in ("3 engines were lost one after another without a token", "refused for another"):
                with pytest.raises(RequestQuarantined, match=how):
                    await prompt_logprobs(world.request(prompt=mine), 1, backend)
            assert len(await prompt_logprobs(world.request(prompt=others), 1, backend)) == len(others.tokens)
            assert await complete(world.request(prompt=others), backend)
            with pytest.raises(RequestQuarantined, match="refused for another"):
                await complete(world.request(prompt=mine), backend)  # an engine would read the same

    asyncio.run(main())


def test_losses_with_a_token_in_between_are_not_the_requests_fault(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second verification hangs, and many more engines are lost than a request may lose in a row."""
    expected = answered(world, world.backend(), strategy="autoregressive")
    backend = HangingBackend(world, "target", "verify", num_hangs=0)
    tries = iter(range(1000))

    @asynccontextmanager
    async def lease(self: Any, role: Role, request: SequenceRequest) -> AsyncIterator[Lease]:
        async with LocalBackend.lease(self, role, request) as lease:

            def call(method: str, *message: Any) -> Awaitable[Any]:
                if method == "verify" and next(tries) % 2:
                    raise EngineLost("it died")
                return lease.call(method, *message)

            yield lease.over(call)

    monkeypatch.setattr(HangingBackend, "lease", lease)
    resumed = answered(world, backend, strategy="autoregressive")
    assert resumed.tokens == expected.tokens and resumed.statistics.resumed > 5


def test_a_quarantine_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    quarantine, request = Quarantine(), SequenceRequest([1, 2, 3], 4, SamplingParams())
    quarantine.add(request)
    with pytest.raises(RequestQuarantined):
        quarantine.check(request.after([7]))  # the same prompt, however far it was
    now = QUARANTINE_S + 1
    quarantine.check(request)


def test_a_breaker_lets_one_through_after_pauses_that_double(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    part = Breaker()
    assert part.refusal() is None and not part.is_open
    for pause in (1, 2, 4, 8, 15, 15):
        for _ in range(8):  # all that waited at the same time
            part.failed(EngineHung("it hangs"))
        now += pause - 0.1
        refusal = part.refusal()
        assert isinstance(refusal, EngineHung) and refusal.message == "it hangs; it is asked again in 0.1 s"
        now += 0.2
        assert part.refusal() is None and part.refusal() is not None  # one tries, and the others do without
    part.succeeded()
    assert part.refusal() is None and not part.is_open


def test_a_place_is_asked_for_every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a drafter that is started on demand would have gone away again before anyone asks."""
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    part = Breaker()
    for _ in range(5):
        part.failed(Overloaded("no drafter had a place"))
        now += 0.9
        assert isinstance(part.refusal(), Overloaded)
        now += 0.2
        assert part.refusal() is None
