"""Target and Drafter: a Serve replica that leases sequences, and the engine actor that holds the model and its KV.

A lease is a stream. Its first item says where the sequence is; it then stays open for as long as the request lives, so
that Serve's count of ongoing requests is the number of sequences, and a client that goes away closes it. Everything in
between goes straight to the engine actor, over a channel.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.scaling import KV_SHARE
from deployments.engine_config import EngineConfig
from deployments.serve.channel import Address, Listener
from deployments.serve.metrics import EngineMetrics
from rapid.backend.waiting import TARGET_PATIENCE_S
from rapid.engine.messages import EngineStats, SequenceRequest
from rapid.errors import RapidError
from rapid.models.info import ModelInfo, RankPlacement

if TYPE_CHECKING:  # the replica holds no model: only the actor's process loads torch
    from rapid.engine.engine import Engine
    from rapid.engine.lease import LeasedSequence
    from rapid.engine.sequence import Sequence

logger = logging.getLogger("ray.serve")

_SWITCH_INTERVAL_S = 2e-4
_LISTEN_EVERY_S = 1.0
_ANSWER_WITHIN_S = 5.0
_DOUBT_AFTER_S = 1.5
_DOCUMENTS = 64  # whose readers a replica is known for
_BEGINNING = 256  # tokens that tell documents apart


def document_of(prompt: list[int]) -> str:
    """A name for what the prompt begins with: the next turn of a chat has the same. Empty for a short prompt."""
    if len(prompt) < _BEGINNING:
        return ""
    return hashlib.sha256(str(prompt[:_BEGINNING]).encode()).hexdigest()[:16]


def engines_of(application: str, deployment: str = "") -> str:
    """What the names of the engine actors of an application begin with, or of one of its deployments."""
    return f"rapid-engine-{application}-{deployment and deployment + '-'}"


@dataclass(frozen=True)
class Ticket:
    """A lease: sequence ``lease_id`` of the actor ``engine`` of ``replica``, which answers at ``address``."""

    lease_id: str
    engine: Any
    name: str  # the actor's
    address: Address
    replica: str


@dataclass(frozen=True)
class Doubt:
    """Instead of a lease: the engine of ``replica`` seems to hang, and why."""

    replica: str
    reason: str


class RankActor:
    """One process of an engine. The first rank is the engine; the others compute their share of its passes."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config

    async def address(self) -> str:
        """A free port of this process's machine, where the ranks can meet."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    async def pid(self) -> int:
        """This process's number on its machine, which is the replica's machine too (STRICT_PACK)."""
        return os.getpid()

    async def follow(self, placement: RankPlacement) -> None:
        """Loads this rank's share and computes for the first rank, as long as that lives."""
        from deployments.builders import follow_engine

        await asyncio.to_thread(follow_engine, self._config, placement)

    async def alive(self) -> None:
        """Never returns. A call of a process that dies fails, which tells the replica at once."""
        await asyncio.Event().wait()


class EngineActor(RankActor):
    """One model, its engine and the open sequences. All calls but the first ones name a lease.

    The calls of a request's rounds go over the lease's own channel, without Ray. The sequence is closed when the
    channel ends, whatever became of the coordinator that asked. The process ends when its engine is broken.

    How the engine is (`stats`, and a lease's `pulse`) is told when the processes of all ranks answer: a pass waits for
    all of them, and its age alone would tell of one that is stopped far too late where passes are always slow.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._leases: dict[str, LeasedSequence] = {}
        self._opening: dict[str, Future[Sequence]] = {}
        self._followers: Iterable[Any] = ()
        self._hearing: asyncio.Future[Any] | None = None

    async def load(
        self, placement: RankPlacement | None, drafts: bool, followers: Iterable[Any] = ()
    ) -> tuple[ModelInfo, Address]:
        """Loads the model, with the ``followers`` where there are any, starts the engine, and says where it answers."""
        from deployments.builders import build_engine

        self._followers = followers
        # The engine computes in one thread and is talked to in another, which would wait 5 ms for its turn.
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self._engine: Engine = await asyncio.to_thread(build_engine, self._config, placement, drafts=drafts)
        address = ray.util.get_node_ip_address()
        self._listener = await Listener.start(address, {"call": self.call}, ended=self.close)
        self._engine.ended.add_done_callback(lambda _: os._exit(1))
        return self._engine.model.info, self._listener.address

    async def stats(self) -> EngineStats | None:
        """None until the model is loaded."""
        if not hasattr(self, "_engine"):
            return None
        await self._hear_all_ranks()
        return self._engine.stats()

    async def _hear_all_ranks(self) -> None:
        """Returns when the other ranks have answered; who asks meanwhile waits for the same answers.

        A rank that is gone counts as heard: the replica ends the engine with it.
        """
        if self._hearing is None or self._hearing.done():
            self._hearing = asyncio.gather(*(rank.pid.remote() for rank in self._followers), return_exceptions=True)
        await asyncio.shield(self._hearing)

    async def forget(self, tokens: list[int], salt: str = "") -> None:
        await asyncio.wrap_future(self._engine.forget(tokens, salt))

    async def open(self, lease_id: str, request: SequenceRequest) -> None:
        from rapid.engine.lease import LeasedSequence

        opened = self._opening[lease_id] = self._engine.open(request)
        try:
            sequence = await asyncio.wrap_future(opened)
            self._leases[lease_id] = LeasedSequence(self._engine, sequence)
            sequence.ended.add_done_callback(lambda _: self._leases.pop(lease_id, None))  # it may have ended already
        except asyncio.CancelledError:
            self._engine.abandon(opened)
            raise
        finally:
            del self._opening[lease_id]

    async def call(self, lease_id: str, method: str, *message: Any) -> Any:
        """One call of a lease (`rapid.engine.lease.LeasedSequence`).

        Raises:
            SequenceClosed: the sequence was closed, or expired.
        """
        leased = self._leases.get(lease_id)
        self._engine.get(leased.sequence.id if leased else 0)  # which is in use again
        assert leased is not None
        if method == "pulse":
            await self._hear_all_ranks()
        return await leased.call(method, *message)

    async def close(self, lease_id: str) -> None:
        """Frees the sequence, or ends its wait for room; harmless when it is already gone."""
        if lease_id in self._opening:
            self._engine.abandon(self._opening[lease_id])
        leased = self._leases.get(lease_id)
        if leased is not None:
            self._engine.close(leased.sequence)

    async def ended(self, lease_id: str) -> None:
        """Returns when the sequence is closed, by whomever."""
        leased = self._leases.get(lease_id)
        if leased is not None:
            await asyncio.wrap_future(leased.sequence.ended)


@serve.deployment
class EngineReplica:
    """Starts one engine in its own placement group and leases its sequences. Target and Drafter are both this.

    An engine is one actor, or one for each rank that shares the model. When one of them dies, or stops to follow, this
    process ends too, which ends the others: Ray starts a whole new replica at once, instead of after a few failed
    health checks. When one hangs, this process kills it and ends likewise: no process can tell that of itself.
    """

    async def __init__(self, config: EngineConfig, drafts: bool) -> None:
        group = ray.util.get_current_placement_group()
        self._metrics = EngineMetrics()
        context = serve.get_replica_context()
        self._replica = context.replica_id.unique_id
        self._name = engines_of(context.app_name, context.deployment) + uuid.uuid4().hex

        def start(kind: type[RankActor], rank: int) -> Any:
            bundle = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=1 + rank)
            options = {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus, "max_concurrency": 1000}
            options["name"] = self._name if rank == 0 else None
            return ray.remote(kind).options(**options, scheduling_strategy=bundle).remote(config)

        self._engine = start(EngineActor, 0)
        followers = [start(RankActor, rank) for rank in range(1, config.tensor_parallel)]
        watched = [rank.alive.remote() for rank in (self._engine, *followers)]
        placement = None
        if followers:
            placement = RankPlacement(0, config.tensor_parallel, await self._engine.address.remote())
            watched += [f.follow.remote(replace(placement, rank=i)) for i, f in enumerate(followers, 1)]
        self._watching = asyncio.create_task(self._end_with_first_of(watched))
        # Waiting here keeps the replica, and so the application, out of service until the model is loaded.
        self._info, self._address = await self._engine.load.remote(placement, drafts, followers)
        self._pids = await asyncio.gather(*(rank.pid.remote() for rank in (self._engine, *followers)))
        self._stats: EngineStats = await self._engine.stats.remote()
        self._heard = time.monotonic()
        self._listening = asyncio.create_task(self._end_with_a_hang(config.pass_timeout_s))
        logger.info("%s loaded: %s on %s", config.model, self._info.dtype, self._info.device)

    async def _end_with_first_of(self, calls: list[Any]) -> None:
        """None of the ``calls`` returns while all is well."""
        watched = [asyncio.ensure_future(call) for call in calls]
        ended, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        logger.error("a part of the engine is gone, and the replica goes with it: %s", ended.pop().exception())
        os._exit(1)

    async def _end_with_a_hang(self, pass_timeout_s: float) -> None:
        """Asks the engine every second how it is, and with it all of its ranks."""
        hang = None
        while hang is None:
            await asyncio.sleep(_LISTEN_EVERY_S)
            try:
                async with asyncio.timeout(_ANSWER_WITHIN_S):
                    self._stats = await self._engine.stats.remote()
            except TimeoutError:
                hang = f"no answer for {_ANSWER_WITHIN_S:g} s"
            except RayError:
                return  # it is gone, and `_end_with_first_of` ends this process
            else:
                self._heard = time.monotonic()
                self._metrics.update(self._stats)
                hang = self._stats.pulse.problem(pass_timeout_s)
        logger.error("the engine hangs (%s): its processes %s and the replica are ended", hang, self._pids)
        for pid in self._pids:  # a process that is stopped or stuck in a kernel hears no other signal
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os._exit(1)

    def _hang(self) -> str | None:
        """What seems to be wrong with the engine: long before it is sure, no new lease goes there."""
        silent_s = time.monotonic() - self._heard
        if silent_s > _LISTEN_EVERY_S + _DOUBT_AFTER_S:
            return f"its process has not answered for {silent_s:.1f} s"
        return self._stats.pulse.problem(TARGET_PATIENCE_S)

    @serve.multiplexed(max_num_models_per_replica=_DOCUMENTS)
    async def _remember(self, document: str) -> str:
        """Tells Serve's router that this replica has read ``document``; it forgets the least recently used."""
        return document

    async def lease(self, request: SequenceRequest) -> AsyncIterator[Ticket | Doubt | RapidError]:
        """Opens a sequence; closing this stream, for whatever reason, frees it.

        Where there is no room for it the first item is the error: raised, Serve would log it as this replica's failure.
        """
        # The id is made here and not by the engine: a lease cancelled while it opens can still be closed by name.
        lease_id = uuid.uuid4().hex
        if hang := self._hang():
            yield Doubt(self._replica, hang)
            return
        opened = asyncio.ensure_future(self._engine.open.remote(lease_id, request))
        try:
            try:
                while not (await asyncio.wait([opened], timeout=_LISTEN_EVERY_S))[0]:  # for room, or in vain
                    if hang := self._hang():
                        yield Doubt(self._replica, hang)
                        return
                opened.result()
                if document := serve.get_multiplexed_model_id():
                    await self._remember(document)
            except RapidError as error:
                yield error
                return
            address = self._address.for_channel(lease_id)
            yield Ticket(lease_id, self._engine, self._name, address, self._replica)
            await self._engine.ended.remote(lease_id)
        finally:
            self._engine.close.remote(lease_id)
            if not opened.done():  # Ray may begin two calls in another order, and then this one closed nothing
                opened.add_done_callback(lambda _: self._engine.close.remote(lease_id))

    async def info(self) -> ModelInfo:
        """The loaded model."""
        return self._info

    async def check_health(self) -> None:
        """Fails when nothing watches the engine any more; what is wrong with the engine itself ends this process."""
        if self._listening.done():
            raise RuntimeError("the engine is gone")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {KV_SHARE: self._stats.kv.bytes_used / self._stats.kv.bytes_total}
