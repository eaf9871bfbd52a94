"""The processes of an engine, without Ray: what ends with what."""

from __future__ import annotations

import asyncio
import os
import queue
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from deployments import builders
from deployments.engine_config import EngineConfig
from deployments.serve import engines
from deployments.serve.backend import lease_over
from deployments.serve.channel import Channel
from deployments.serve.engines import EngineReplica, document_of
from deployments.serve.ranks import EngineActor
from rapid.backend.waiting import while_it_goes_on
from rapid.engine.engine import Engine
from rapid.engine.messages import Pulse, SequenceRequest
from rapid.errors import EngineHung, EngineLost
from rapid.models.model import Model
from rapid.sampling.params import SamplingParams

REQUEST = SequenceRequest([1, 2, 3], 4, SamplingParams())


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> queue.Queue[int]:
    """The codes with which this process would have ended."""
    codes: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(os, "_exit", codes.put)
    return codes


@pytest.fixture
def running(tiny_model: Callable[..., Model], exits: queue.Queue[int]) -> Iterator[Engine]:
    engine = Engine(tiny_model(), kv_bytes=2**20)
    yield engine
    engine.shutdown()


@pytest.fixture
def actor(running: Engine, monkeypatch: pytest.MonkeyPatch) -> EngineActor:
    monkeypatch.setattr(builders, "build_engine", lambda *_, **__: running)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    return EngineActor(EngineConfig())


def test_a_lease_ends_with_its_connection(actor: EngineActor, running: Engine) -> None:
    """A coordinator that dies says nothing, and its sequences would hold their memory until they are idle for long."""

    async def main() -> None:
        _, address = await actor.load(None, drafts=True)
        for lease_id in ("mine", "another's"):
            await actor.open(lease_id, REQUEST)
        ended = asyncio.create_task(actor.ended("mine"))
        channel = await Channel.connect(address.for_channel("mine"), "mine")
        await channel.call("call", "prefill")
        channel.close()
        await asyncio.wait_for(ended, 10)
        assert (running.stats().num_sequences, list(actor._leases)) == (1, ["another's"])
        actor._listener.close()

    asyncio.run(main())


def test_a_lease_that_is_closed_just_when_it_opens_leaves_nothing(actor: EngineActor, running: Engine) -> None:
    async def main() -> None:
        actor._engine = running
        opened = asyncio.create_task(actor.open("a", REQUEST))
        await asyncio.sleep(0)
        actor._opening["a"].result(timeout=10)  # the engine has let it in, and nobody here knows yet
        await actor.close("a")
        await opened
        assert (running.stats().num_sequences, actor._leases) == (0, {})

    asyncio.run(main())


def test_a_process_ends_with_its_engine(
    actor: EngineActor, running: Engine, exits: queue.Queue[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise EngineLost("a rank is gone")

    async def main() -> None:
        await actor.load(None, drafts=True)
        await actor.open("a", REQUEST)
        monkeypatch.setattr(running.model, "forward", broken)
        with pytest.raises(EngineLost, match="a rank is gone"):
            await actor.call("a", "prefill")
        actor._listener.close()

    asyncio.run(main())
    assert exits.get(timeout=10) == 1


@pytest.mark.parametrize("gone", ["alive", "follow"])
def test_a_replica_ends_with_any_of_its_ranks(
    gone: str, exits: queue.Queue[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank may stop to follow without its process dying."""

    async def main() -> None:
        class Actor:
            """The handle of a rank, all of whose calls are under way for as long as the test says nothing else."""

            def __init__(self, rank: int) -> None:
                self.asked: dict[str, tuple[Any, ...]] = {}
                self.calls = {name: asyncio.get_running_loop().create_future() for name in ("alive", "follow", "load")}
                if rank == 0:
                    self.calls["address"] = asyncio.get_running_loop().create_future()
                    self.calls["address"].set_result("host:1")

            def __getattr__(self, name: str) -> Any:
                return SimpleNamespace(remote=lambda *args: self.asked.update({name: args}) or self.calls[name])

        actors: list[Actor] = []

        def start(config: EngineConfig) -> Actor:
            actors.append(Actor(len(actors)))
            return actors[-1]

        kind = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))
        replica_id = SimpleNamespace(unique_id="one")
        context = SimpleNamespace(app_name="rapid", deployment="Target", replica_id=replica_id)
        monkeypatch.setattr(engines.ray, "remote", lambda _: kind)
        monkeypatch.setattr(engines.ray.util, "get_current_placement_group", lambda: None)
        monkeypatch.setattr(engines.serve, "get_replica_context", lambda: context)
        monkeypatch.setattr(engines, "EngineMetrics", object)
        monkeypatch.setattr(engines, "PlacementGroupSchedulingStrategy", lambda *_, **__: None)
        replica = EngineReplica.func_or_class.__new__(EngineReplica.func_or_class)
        starting = asyncio.create_task(replica.__init__(EngineConfig(tensor_parallel=3), drafts=True))
        while len(actors) < 3 or "load" not in actors[0].asked:
            await asyncio.sleep(0)
        assert exits.empty() and actors[0].asked["load"][2] == actors[1:]  # whom the engine asks how they are
        actors[2].calls[gone].set_exception(EngineLost("it heard nothing any more"))
        await asyncio.wait_for(replica._watching, 10)
        assert exits.get_nowait() == 1
        starting.cancel()

    asyncio.run(main())


def test_how_an_engine_is_is_told_when_all_of_its_ranks_answer(actor: EngineActor) -> None:
    """Its own process goes on when another rank is stopped, and its pass waits: where passes are slow, for long."""
    asked, going_on = iter(range(99)), asyncio.Event()

    async def stopped() -> int:
        next(asked)
        await going_on.wait()
        return 7

    async def gone() -> int:
        raise ActorDiedError

    ranks = [SimpleNamespace(pid=SimpleNamespace(remote=pid)) for pid in (stopped, gone)]

    async def main() -> None:
        _, address = await actor.load(None, drafts=True, followers=ranks)
        await actor.open("a", REQUEST)
        channel = await Channel.connect(address.for_channel("a"), "a")
        lease = lease_over(channel)
        never = asyncio.get_running_loop().create_future()
        with pytest.raises(EngineHung, match="the engine's process has not answered"):
            await while_it_goes_on(never, lease.pulse, patience_s=0.1, limit_s=5.0)
        waiting = [asyncio.ensure_future(how()) for how in (lease.pulse, actor.stats)]
        assert not (await asyncio.wait(waiting, timeout=0.1))[0] and next(asked) == 1  # both wait for the first answer
        going_on.set()
        pulse, stats = await asyncio.gather(*waiting)
        assert stats.pulse == pulse == Pulse(0.0, None)
        await lease.pulse()
        assert next(asked) == 3
        channel.close()
        actor._listener.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_an_engine_that_is_being_loaded_has_nothing_to_say() -> None:
    assert asyncio.run(EngineActor(EngineConfig()).stats()) is None


def test_a_document_s_readers_are_remembered_for_each_salt() -> None:
    """Who has another salt does not share its pages, and gains nothing from the same replica."""
    prompt = list(range(300))
    first, next_turn, another = (
        document_of(replace(REQUEST, prompt=tokens, salt=salt))
        for tokens, salt in ((prompt, "a"), ([*prompt, 7], "a"), (prompt, "b"))
    )
    assert first == next_turn != another
    assert document_of(replace(REQUEST, prompt=prompt[:200])) == ""
