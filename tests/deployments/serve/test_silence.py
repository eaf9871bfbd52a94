"""Parts of the application that do not answer, without a cluster: what is noticed, by whom, and in which words."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    WorkerCrashedError,
)
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.app import build
from deployments.config import parse_config
from deployments.serve import backend as ray_backend
from deployments.serve import channel as channels
from deployments.serve import engines, ingress
from deployments.serve.backend import RayBackend
from deployments.serve.channel import Address, Channel, Listener
from deployments.serve.engines import EngineReplica
from deployments.serve.heartbeat import beating, heard
from deployments.serve.ray_errors import understood
from deployments.service import LocalService
from rapid.backend.protocol import Vitals
from rapid.engine.messages import EngineStats, Pulse, SequenceRequest
from rapid.errors import EngineHung, EngineLost, Overloaded, RapidError, RetrievalFailed
from rapid.kv_cache.stats import PoolStats
from rapid.sampling.params import SamplingParams
from retrieval.errors import StoreTimeout

LIMIT_S = 30.0
REQUEST = SequenceRequest([1, 2, 3], 4, SamplingParams())
IDLE = Pulse(0.0, 0.01)


def stats(pulse: Pulse = IDLE) -> EngineStats:
    kv = PoolStats(*[0] * len(PoolStats.__annotations__))
    return EngineStats(0, 0, 0, kv, 0, 0, 0, 0, pulse)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ActorDiedError(), EngineLost, "the engine is gone"),
        (ActorUnavailableError("gone for a moment", None), EngineLost, "the engine cannot be reached"),
        (OutOfMemoryError("the node ran low on memory"), EngineLost, "its machine had no memory left"),
        (NodeDiedError("gone"), EngineLost, "was on a machine that is gone"),
        (WorkerCrashedError(), EngineLost, "the engine is gone"),
        (GetTimeoutError("late"), EngineLost, "did not answer in time"),
        (TimeoutError(), EngineLost, "did not answer in time"),
        (DeploymentUnavailableError(DeploymentID("Target")), EngineLost, "has no replica that answers"),
        (
            BackPressureError(num_queued_requests=9, max_queued_requests=9),
            Overloaded,
            "the queue of the engine is full",
        ),
        (EngineHung("as it was"), EngineHung, "as it was"),
    ],
)
def test_all_that_ray_raises_is_understood(error: Exception, kind: type[RapidError], words: str) -> None:
    with pytest.raises(kind, match=words) as raised, understood("the engine", EngineLost):
        raise error
    assert raised.value.status == (429 if kind is Overloaded else 503)


async def steps(*pauses: float) -> AsyncGenerator[int, None]:
    for number, pause in enumerate(pauses):
        await asyncio.sleep(pause)
        yield number


def test_a_stream_with_nothing_to_say_says_that() -> None:
    async def main() -> None:
        said = [word async for word in beating(steps(0.0, 0.3), every_s=0.05)]
        assert said[0] is None and said.count(None) >= 3 and [word for word in said if word is not None] == [0, 1]
        told = heard(beating(steps(0.0, 0.3), every_s=0.05), first_s=LIMIT_S, silent_s=LIMIT_S)
        assert [word async for word in told] == [0, 1]

    asyncio.run(main())


def test_a_silent_stream_ends_with_a_timeout_and_a_closed_one_closes_what_it_reads() -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async for _ in heard(beating(steps(0.0, LIMIT_S), every_s=LIMIT_S), first_s=LIMIT_S, silent_s=0.05):
                pass
        closed = asyncio.Event()

        async def source() -> AsyncGenerator[int, None]:
            try:
                yield 1
                await asyncio.sleep(LIMIT_S)
            finally:
                closed.set()

        words = beating(source(), every_s=0.01)
        assert [await anext(words), await anext(words), await anext(words)] == [None, 1, None]
        await words.aclose()
        assert closed.is_set()

    asyncio.run(main())


def test_who_says_no_hello_is_not_listened_to_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "_HELLO_S", 0.1)

    async def main() -> None:
        async def ended(_: str) -> None: ...

        listener = await Listener.start("127.0.0.1", {}, ended=ended)
        reader, writer = await asyncio.open_connection(listener.address.host, listener.address.port)
        writer.write(listener.address.secret)  # and no name
        assert await asyncio.wait_for(reader.read(), LIMIT_S) == b""
        writer.close()
        await writer.wait_closed()
        listener.close()
        monkeypatch.setattr(asyncio, "open_connection", never)
        with pytest.raises(OSError):
            await Channel.connect(Address("127.0.0.1", 9, b""), "a")

    asyncio.run(main())


class Handle:
    """A deployment's handle, or an actor's, whose methods give what ``answers`` makes, by name."""

    def __init__(self, **answers: Callable[..., Any]) -> None:
        self._answers = answers

    def options(self, **_: Any) -> Handle:
        return self

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=self._answers[name])


async def never(*_: Any) -> Any:
    await asyncio.Event().wait()


def failing(error: Exception) -> Callable[..., Any]:
    async def fail(*_: Any) -> Any:
        raise error

    return fail


def answering(value: Any) -> Callable[..., Any]:
    async def answer(*_: Any) -> Any:
        return value

    return answer


def backend(target: Handle, drafter: Handle, retriever: Handle) -> RayBackend:
    parts: Any = {"target": target, "drafter": drafter}
    made = RayBackend(parts, retriever, overlap=False)  # type: ignore[arg-type]
    made._actors = dict(parts)
    return made


def test_vitals_name_what_does_not_answer_and_find_what_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that Ray's memory monitor has killed raises another error than one that died, for ever."""
    monkeypatch.setattr(ray_backend, "_VITALS_TIMEOUT_S", 0.1)
    replaced = Handle(stats=answering(stats()))
    target = Handle(stats=failing(OutOfMemoryError("killed")), address=answering((None, replaced)))
    drafter, retriever = Handle(stats=never), Handle(answers=never)

    async def main() -> None:
        found = await asyncio.wait_for(backend(target, drafter, retriever).vitals(), LIMIT_S)
        assert set(found.engines) == {"target"}
        assert found.problems["drafter"] == "the drafter's engine has not answered for 0.1 s"
        assert found.problems["retriever"] == "the retriever has not answered for 0.1 s"
        stuck = Handle(stats=answering(stats(Pulse(9.0, 0.01))))
        found = await backend(stuck, Handle(stats=answering(stats())), Handle(answers=answering(None))).vitals()
        assert found.problems == {"target": "stuck in one pass for 9.0 s"}

    asyncio.run(main())


class Words:
    """The stream of a retriever that says ``words``, and then nothing more."""

    def __init__(self, *words: Any) -> None:
        self._words, self.cancelled = iter(words), False

    def __aiter__(self) -> Words:
        return self

    async def __anext__(self) -> Any:
        word = next(self._words, self)
        if word is self:
            await never()
        if isinstance(word, Exception):
            raise word
        return word

    def cancel(self) -> None:
        self.cancelled = True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the retriever did not answer in time"),
        ((None, None), "the retriever did not answer in time"),
        ((None, StoreTimeout("Qdrant has not answered for 2 s.")), "Qdrant has not answered for 2 s."),
    ],
)
def test_a_retriever_that_keeps_one_waiting_is_not_asked_by_the_next(
    words: tuple[Any, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_backend, "_OPTIONAL_TIMEOUT_S", 0.1)
    streams: list[Words] = []

    def retrieve(*_: Any) -> Words:
        streams.append(Words(*words))
        return streams[-1]

    async def main() -> None:
        away = backend(Handle(), Handle(), Handle(retrieve=retrieve))
        for _ in range(3):
            with pytest.raises(RetrievalFailed, match=message):
                await asyncio.wait_for(away.retrieve(["text"], "query", None), LIMIT_S)
        assert [stream.cancelled for stream in streams] == [True]
        words_after = (None, "the answer")
        away._retrieving._next_try = 0.0
        streams_before = len(streams)
        away._retriever = Handle(retrieve=lambda *_: Words(*words_after))  # type: ignore[assignment]
        assert await away.retrieve(["text"], "query", None) == "the answer"  # type: ignore[comparison-overlap]
        assert len(streams) == streams_before and not away._retrieving.is_open

    asyncio.run(main())


def test_a_quick_failure_of_the_retriever_costs_nothing_and_is_tried_again() -> None:
    async def main() -> None:
        asked = iter(range(9))
        away = backend(Handle(), Handle(), Handle(retrieve=lambda *_: (next(asked), Words(ActorDiedError()))[1]))
        for _ in range(3):
            with pytest.raises(RetrievalFailed, match="the retriever is gone"):
                await away.retrieve(["text"], "query", None)
        assert next(asked) == 3

    asyncio.run(main())


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> queue.Queue[int]:
    """The codes with which this process would have ended."""
    codes: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(os, "_exit", codes.put)
    return codes


def replica(engine: Handle, *pids: int) -> Any:
    made = EngineReplica.func_or_class.__new__(EngineReplica.func_or_class)
    made._engine, made._pids, made._stats, made._heard = engine, pids, stats(), time.monotonic()
    made._metrics = SimpleNamespace(update=lambda _: None)
    return made


@pytest.mark.parametrize("hang", ["a stopped process", "a stuck pass"])
def test_a_replica_kills_an_engine_that_hangs_and_ends(
    hang: str, exits: queue.Queue[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that hears no other signal than SIGKILL."""
    monkeypatch.setattr(engines, "_LISTEN_EVERY_S", 0.01)
    monkeypatch.setattr(engines, "_ANSWER_WITHIN_S", 0.1)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    process.send_signal(signal.SIGSTOP)
    asked = never if hang == "a stopped process" else answering(stats(Pulse(21.0, 0.01)))
    asyncio.run(asyncio.wait_for(replica(Handle(stats=asked), process.pid)._end_with_a_hang(20.0), LIMIT_S))
    assert process.wait(LIMIT_S) == -signal.SIGKILL
    assert exits.get_nowait() == 1


def test_a_replica_waits_for_long_passes_and_leaves_dead_engines_to_others(
    exits: queue.Queue[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_LISTEN_EVERY_S", 0.001)
    said: list[Any] = [stats(Pulse(19.0, 0.01)), stats(Pulse(30.0, 10.0)), stats(Pulse(30.0, None)), RayError("gone")]

    async def answer() -> EngineStats:
        found = said.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    asyncio.run(asyncio.wait_for(replica(Handle(stats=answer))._end_with_a_hang(20.0), LIMIT_S))
    assert exits.empty() and not said


@pytest.mark.parametrize("trouble", ["silent", "stuck"])
def test_a_replica_in_doubt_gives_no_leases(trouble: str) -> None:
    doubtful = replica(Handle())
    if trouble == "silent":
        doubtful._heard = time.monotonic() - 3.0
    else:
        doubtful._stats = stats(Pulse(4.5, 0.01))

    async def main() -> None:
        [error] = [item async for item in doubtful.lease(REQUEST)]
        assert isinstance(error, EngineHung) and "not well" in error.message

    asyncio.run(main())


def test_every_deployment_is_checked_often() -> None:
    ingress = build(parse_config({}))._bound_deployment
    coordinator = ingress.init_args[1]._bound_deployment
    parts = [ingress, coordinator, *(part._bound_deployment for part in coordinator.init_args[1:])]
    assert len(parts) == 5
    for part in parts:
        checks = part._deployment_config
        assert 3 * (checks.health_check_period_s + checks.health_check_timeout_s) <= 12


def test_an_ingress_does_not_wait_for_a_coordinator_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_HEALTH_LIMIT_S", "_SILENCE_LIMIT_S"):
        monkeypatch.setattr(ingress, name, 0.1)
    stream = Words(None, "an event", None)
    service = ingress.RemoteService(Handle(call=never, generate=lambda *_: stream))  # type: ignore[arg-type]

    async def main() -> None:
        with pytest.raises(RapidError, match="the coordinator did not answer in time") as raised:
            await asyncio.wait_for(service.health(), LIMIT_S)
        assert raised.value.status == 503
        events = service.generate(None, "me")  # type: ignore[arg-type]
        assert await anext(events) == "an event"  # type: ignore[comparison-overlap]
        with pytest.raises(RapidError, match="a part of the service stopped while it worked on this request"):
            await asyncio.wait_for(anext(events), LIMIT_S)
        assert stream.cancelled

    asyncio.run(main())


def test_health_is_refused_without_a_target_and_degraded_without_what_requests_can_do_without() -> None:
    found = Vitals({"target": stats()}, {"drafter": "it hangs"})

    async def vitals() -> Vitals:
        return found

    service = LocalService.__new__(LocalService)
    service._backend = SimpleNamespace(vitals=vitals, info=lambda _: SimpleNamespace(name="letters"))  # type: ignore[assignment]

    async def main() -> None:
        nonlocal found
        health = await service.health()
        assert (health.status, health.problems, health.pass_age_s) == (
            "degraded",
            {"drafter": "it hangs"},
            {"target": 0.0},
        )
        found = Vitals({}, {"target": "stuck in one pass for 9.0 s"})
        with pytest.raises(EngineLost, match="the target is not well: stuck in one pass for"):
            await service.health()

    asyncio.run(main())
