"""Parts of the application that do not answer, without a cluster: what is noticed, by whom, and in which words."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
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
from ray.serve._private import constants as ray_constants
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from cluster.processes import ENVIRONMENT
from deployments.app import build
from deployments.config import parse_config
from deployments.heartbeat import beating, heard
from deployments.serve import backend as ray_backend
from deployments.serve import channel as channels
from deployments.serve import engine_actors, engines, ingress
from deployments.serve.backend import RayBackend
from deployments.serve.channel import Address, Channel, Listener
from deployments.serve.engines import Doubt, EngineReplica, Ticket
from deployments.serve.ray_errors import understood
from deployments.service import LocalService
from rapid.backend import waiting
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


@pytest.mark.parametrize("is_asking", [True, False])
def test_a_stream_that_is_cancelled_twice_gives_everything_back(is_asking: bool) -> None:
    """The second time while what the first one ended is given back."""

    async def main() -> None:
        begun, giving_back, goes_on, given_back = (asyncio.Event() for _ in range(4))

        async def source() -> AsyncGenerator[str, None]:
            try:
                if not is_asking:
                    yield "a word"
                begun.set()
                await asyncio.Event().wait()
                yield "never"
            finally:
                giving_back.set()
                await goes_on.wait()
                given_back.set()

        async def ask() -> None:
            async with aclosing(beating(source())) as words:
                async for word in words:
                    if word == "a word":
                        begun.set()
                        await asyncio.Event().wait()

        asking = asyncio.create_task(ask())
        await asyncio.wait_for(begun.wait(), LIMIT_S)
        for _ in range(2):
            asking.cancel()
            await asyncio.wait_for(giving_back.wait(), LIMIT_S)
        await asyncio.wait([asking], timeout=0.1)
        goes_on.set()
        await asyncio.wait_for(given_back.wait(), LIMIT_S)

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
        writer.write(bytes(32))  # and no name
        assert await asyncio.wait_for(reader.read(), LIMIT_S) == b""
        writer.close()
        await writer.wait_closed()
        listener.close()
        monkeypatch.setattr(asyncio, "open_connection", never)
        with pytest.raises(OSError):
            await Channel.connect(Address("127.0.0.1", 9, b""), "a", 0.1)

    asyncio.run(main())


class Handle:
    """A deployment's handle, or an actor's, whose methods give what ``answers`` makes, by name."""

    def __init__(self, *, deployment_name: str = "", **answers: Callable[..., Any]) -> None:
        self._answers, self.deployment_name = answers, deployment_name

    def options(self, **_: Any) -> Handle:
        return self

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=self._answers[name])


async def never(*_: Any, **__: Any) -> Any:
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
    return RayBackend(parts, retriever, overlap=False)  # type: ignore[arg-type]


@pytest.fixture
def engine_handles(monkeypatch: pytest.MonkeyPatch) -> dict[str, Handle]:
    """What Ray knows of the engines of this application, by deployment and number."""
    handles: dict[str, Handle] = {}
    beginning = engines.engines_of("app")
    monkeypatch.setattr(engine_actors.serve, "get_replica_context", lambda: SimpleNamespace(app_name="app"))
    monkeypatch.setattr(engine_actors.ray.util, "list_named_actors", lambda: [beginning + name for name in handles])
    monkeypatch.setattr(engine_actors.ray, "get_actor", lambda name: handles[name.removeprefix(beginning)])
    monkeypatch.setattr(engine_actors, "_ANSWER_WITHIN_S", 0.1)
    monkeypatch.setattr(engine_actors.asked, "__defaults__", (0.1,))
    return handles


def test_vitals_tell_of_every_engine(engine_handles: dict[str, Handle]) -> None:
    """The engine that hangs need not be the one that was leased last."""
    parts = {role: Handle(deployment_name=role.title()) for role in ("target", "drafter")}
    whole = backend(parts["target"], parts["drafter"], Handle(answers=answering(None)))

    async def vitals() -> Vitals:
        return await asyncio.wait_for(whole.vitals(), LIMIT_S)

    async def main() -> None:
        engine_handles.update({f"Target-{i}": Handle(stats=answering(stats())) for i in (1, 2)})
        engine_handles["Drafter-1"] = Handle(stats=answering(stats()))
        found = await vitals()
        assert {role: len(each) for role, each in found.engines.items()} == {"target": 2, "drafter": 1}
        assert not found.problems

        engine_handles["Target-2"]._answers["stats"] = answering(stats(Pulse(9.0, 0.01)))
        engine_handles["Drafter-1"]._answers["stats"] = never
        whole._retriever = Handle(answers=never)  # type: ignore[assignment]
        found = await vitals()
        assert found.problems == {
            "target": "1 of 2 engines: stuck in one pass for 9.0 s",
            "drafter": "the engine has not answered for 0.1 s",
            "retriever": "the retriever has not answered for 0.1 s",
        }
        assert found.serves("target") and not found.serves("drafter")

        del engine_handles["Target-1"]
        found = await vitals()
        assert found.problems["target"] == "stuck in one pass for 9.0 s" and not found.serves("target")

    asyncio.run(main())


def test_vitals_forget_engines_that_are_gone_and_do_not_count_those_that_start(
    engine_handles: dict[str, Handle],
) -> None:
    """One that Ray's memory monitor has killed raises another error than one that died."""
    parts = {role: Handle(deployment_name=role.title()) for role in ("target", "drafter")}
    whole = backend(parts["target"], parts["drafter"], Handle(answers=answering(None)))
    engine_handles["Target-1"] = Handle(stats=failing(OutOfMemoryError("killed")))
    engine_handles["Target-2"] = Handle(stats=answering(stats()))
    engine_handles["Target-3"] = Handle(stats=never)  # its process starts
    engine_handles["Target-4"] = Handle(stats=answering(None))  # its model is being loaded
    starting = engines.engines_of("app") + "Target-3"

    async def main() -> None:
        found = await asyncio.wait_for(whole.vitals(), LIMIT_S)
        assert len(found.engines["target"]) == 1 and found.problems == {"drafter": "there is no engine"}
        whole._least = {"drafter": 0}
        assert not (await whole.vitals()).problems
        whole._least = {"target": 2, "drafter": 0}  # one is gone with its replica, and the next is not there yet
        assert (await whole.vitals()).problems == {"target": "there are 1 of 2 engines"}
        whole._actors.has_leased(starting)  # so it was there, and is silent now
        assert list((await whole.vitals()).problems) == ["target"]

    asyncio.run(main())


def test_what_hangs_is_told_although_ray_does_not_answer(
    engine_handles: dict[str, Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    going_on = threading.Event()
    parts = {role: Handle(deployment_name=role.title()) for role in ("target", "drafter")}
    whole = backend(parts["target"], parts["drafter"], Handle(answers=answering(None)))
    engine_handles.update({name: Handle(stats=answering(stats())) for name in ("Target-1", "Drafter-1")})

    async def main() -> None:
        assert not (await whole.vitals()).problems
        monkeypatch.setattr(engine_actors.ray.util, "list_named_actors", lambda: going_on.wait(LIMIT_S) and [])
        monkeypatch.setattr(engine_actors.EngineActors.find, "__defaults__", (0.1,))
        engine_handles["Target-1"]._answers["stats"] = never
        try:
            found = await asyncio.wait_for(whole.vitals(), LIMIT_S / 2)
        finally:
            going_on.set()
        assert found.problems == {"target": "the engine has not answered for 0.1 s"}

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


class Working(Words):
    """The stream of a retriever that says that it works."""

    async def __anext__(self) -> None:
        await asyncio.sleep(0.01)


def test_a_document_that_takes_too_long_costs_nobody_else_his_passages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_backend, "retrieval_limit_s", lambda _: 0.1)

    async def main() -> None:
        working = Working()
        away = backend(Handle(), Handle(), Handle(retrieve=lambda *_: working, compute=lambda *_: working))
        with pytest.raises(RetrievalFailed, match="has worked for 0 s and is not done"):
            await asyncio.wait_for(away.retrieve(["a long text"], "query", None), LIMIT_S)
        assert working.cancelled
        with pytest.raises(RetrievalFailed, match="has worked for 0 s and is not done"):
            await asyncio.wait_for(away.embed(["a text that is as long"]), LIMIT_S)
        other = Handle(retrieve=lambda *_: Words(None, "the passages"), compute=lambda *_: Words(None, "the vectors"))
        away._retriever = other  # type: ignore[assignment]
        assert await away.retrieve(["text"], "query", None) == "the passages"  # type: ignore[comparison-overlap]
        assert await away.embed(["text"]) == "the vectors"  # type: ignore[comparison-overlap]

    asyncio.run(main())


def test_a_retriever_that_computes_nothing_is_not_asked_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_backend, "_NEEDED_TIMEOUT_S", 0.1)

    async def main() -> None:
        asked: list[tuple[Any, ...]] = []
        answers: dict[str, Words] = {"embed": Words(None), "lengths": Words(None, "the lengths")}
        retriever = Handle(
            retrieve=lambda *_: Words(None, "the passages"),
            compute=lambda client, method, *_: (asked.append((client, method)), answers[method])[1],
        )
        away = backend(Handle(), Handle(), retriever)
        for _ in range(2):
            with pytest.raises(RetrievalFailed, match="did not answer in time"):
                await asyncio.wait_for(away.embed(["text"], "salt", "client"), LIMIT_S)
        assert asked == [("client", "embed")], "the second one has waited too"
        assert await away.retrieve(["text"], "query", None) == "the passages"  # type: ignore[comparison-overlap]
        away._computing._next_try = 0.0
        assert await away.text_lengths(["text"], "client") == "the lengths"  # type: ignore[comparison-overlap]
        assert not away._computing.is_open

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
    made._metrics, made._replica = SimpleNamespace(update=lambda _: None), "one"
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
    asked = answering(stats(Pulse(21.0, 0.01))) if hang == "a stuck pass" else never
    hanging = replica(Handle(stats=asked), process.pid)
    asyncio.run(asyncio.wait_for(hanging._end_with_a_hang(20.0), LIMIT_S))
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
        [doubt] = [item async for item in doubtful.lease(REQUEST)]
        assert isinstance(doubt, Doubt) and doubt.replica == "one" and doubt.reason

    asyncio.run(main())


def test_a_replica_whose_engine_stops_while_a_lease_waits_for_room_gives_it_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the request would wait, where another engine has room."""
    monkeypatch.setattr(engines, "_LISTEN_EVERY_S", 0.01)
    closed: list[str] = []

    def open_(*_: Any) -> Any:
        stops._heard = time.monotonic() - 3.0
        return never()

    stops = replica(Handle(open=open_, close=lambda lease_id: closed.append(lease_id)))

    async def main() -> None:
        [doubt] = [item async for item in stops.lease(REQUEST)]
        assert isinstance(doubt, Doubt) and len(closed) == 1

    asyncio.run(asyncio.wait_for(main(), LIMIT_S))


def test_a_lease_whose_open_is_carried_out_after_its_close_is_closed_again() -> None:
    """Ray may begin the calls of an actor in another order than they were made."""
    closed: list[str] = []

    async def main() -> None:
        opening, begun = asyncio.Event(), asyncio.Event()

        async def open_(*_: Any) -> None:
            begun.set()
            await opening.wait()

        late = replica(Handle(open=open_, close=closed.append)).lease(REQUEST)
        waiting_for_it = asyncio.ensure_future(anext(late))
        await begun.wait()
        waiting_for_it.cancel()
        await asyncio.wait([waiting_for_it])
        assert len(closed) == 1
        opening.set()
        while len(closed) < 2:
            await asyncio.sleep(0)
        assert closed[0] == closed[1]

    asyncio.run(asyncio.wait_for(main(), LIMIT_S))


class Leases:
    """The streams of leases of a deployment whose replicas answer in turn with ``firsts``."""

    def __init__(self, *firsts: Any) -> None:
        self._firsts = iter(firsts)

    def __call__(self, _: SequenceRequest) -> Words:
        return Words(next(self._firsts))


def test_a_replica_in_doubt_and_one_that_hangs_are_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    avoided: set[str] = set()
    monkeypatch.setattr(ray_backend, "avoid", avoided.add)
    monkeypatch.setattr(ray_backend, "trust", avoided.discard)

    async def main() -> None:
        async def ended(_: str) -> None: ...

        async def call(_: str, method: str, *message: Any) -> Any:
            return Pulse(9.0, 0.01) if method == "pulse" else await answer()

        answer: Callable[[], Any] = never
        listener = await Listener.start("127.0.0.1", {"call": call}, ended=ended)
        engine = Handle(close=lambda _: None)
        ticket = Ticket("a", engine, "an engine's name", listener.address.for_channel("a"), "two")
        target = Handle(lease=Leases(Doubt("one", "silent for 3 s"), ticket))
        whole = backend(target, Handle(), Handle())
        with pytest.raises(EngineHung, match="an engine of the target is not well: silent for 3 s"):
            async with whole.lease("target", REQUEST):
                pass
        assert avoided == {"one"}
        async with whole.lease("target", REQUEST) as lease:
            hasty = replace(lease, patience_s=0.1)
            with pytest.raises(EngineHung, match="stuck in one pass"):
                await asyncio.wait_for(hasty.verify(None), LIMIT_S)  # type: ignore[arg-type]
            assert avoided == {"one", "two"} and whole._hanging["target"].is_open
            answer = answering("a verdict")
            assert await hasty.verify(None) == "a verdict"  # type: ignore[arg-type, comparison-overlap]
            assert avoided == {"one"} and not whole._hanging["target"].is_open
        listener.close()

    asyncio.run(asyncio.wait_for(main(), LIMIT_S))


def test_who_leaves_while_the_channel_is_made_leaves_no_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's process knows the name of a channel only when its caller has been greeted."""
    closed: list[str] = []

    async def main() -> None:
        connecting = asyncio.Event()

        async def connect(*_: Any) -> Any:
            connecting.set()
            await never()

        monkeypatch.setattr(Channel, "connect", connect)
        engine = Handle(close=closed.append)
        ticket = Ticket("a", engine, "an engine's name", Address("127.0.0.1", 9, b""), "one")
        whole = backend(Handle(lease=Leases(ticket)), Handle(), Handle())

        async def request() -> None:
            async with whole.lease("target", REQUEST):
                pass

        asking = asyncio.create_task(request())
        await connecting.wait()
        asking.cancel()
        await asyncio.wait([asking])
        assert asking.cancelled() and closed == ["a"]

    asyncio.run(asyncio.wait_for(main(), LIMIT_S))


def test_what_one_can_do_without_costs_less_than_two_seconds() -> None:
    assert (1 + waiting.LATE) * waiting.DRAFTER_PATIENCE_S < 2
    assert ray_backend._OPTIONAL_TIMEOUT_S < 2


def test_every_deployment_is_checked_often() -> None:
    ingress = build(parse_config({}))._bound_deployment
    coordinator = ingress.init_args[1]._bound_deployment
    parts = [ingress, coordinator, *(part._bound_deployment for part in coordinator.init_args[1:])]
    assert len(parts) == 5
    for part in parts:
        checks = part._deployment_config
        assert 3 * (checks.health_check_period_s + checks.health_check_timeout_s) <= 12
    period, timeout, farewell = (
        float(ENVIRONMENT[f"RAY_SERVE_PROXY_{name}_S"])
        for name in ("HEALTH_CHECK_PERIOD", "HEALTH_CHECK_TIMEOUT", "GRACEFUL_SHUTDOWN_TIMEOUT")
    )
    farewell += float(ENVIRONMENT["RAY_kill_worker_timeout_milliseconds"]) / 1000
    assert 3 * (period + timeout) + farewell <= 8
    serve = Path(ray_constants.__file__)
    known, raylet = serve.read_bytes(), (serve.parents[2] / "core/src/ray/raylet/raylet").read_bytes()
    for name in ENVIRONMENT.keys() - {"MALLOC_ARENA_MAX"}:  # this release of Ray knows them
        assert name.encode() in known or name.removeprefix("RAY_").encode() in raylet, name


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
    found = Vitals({"target": [stats(), stats()]}, {"drafter": "it hangs"})

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
        found = Vitals({"target": [stats(), stats(Pulse(9.0, 0.01))]}, {"target": "1 of 2 engines: stuck"})
        health = await service.health()
        assert (health.status, health.pass_age_s) == ("degraded", {"target": 9.0})
        found = Vitals({"target": [stats(Pulse(9.0, 0.01))]}, {"target": "stuck in one pass for 9.0 s"})
        with pytest.raises(EngineLost, match="the target is not well: stuck in one pass for"):
            await service.health()

    asyncio.run(main())


def test_what_a_stream_sets_for_itself_is_there_when_it_goes_on() -> None:
    """Spans of a trace find their parent in the context."""
    mark: ContextVar[int] = ContextVar("mark", default=0)

    async def marked() -> AsyncGenerator[int, None]:
        token = mark.set(1)
        try:
            for _ in range(3):
                yield mark.get()
        finally:
            mark.reset(token)  # raises in another context

    async def story() -> list[int]:
        async with aclosing(beating(marked())) as stream:
            return [item async for item in stream if item is not None][:2]

    async def left() -> None:
        stream = beating(marked())
        await anext(stream)
        assert await anext(stream) == 1
        await stream.aclose()

    assert asyncio.run(story()) == [1, 1]
    asyncio.run(left())
