"""Target and Drafter: a Serve replica that leases the sequences of an engine, and ends with it.

A lease is a stream. Its first item says where the sequence is; it then stays open for as long as the request lives, so
that Serve's count of ongoing requests is the number of sequences, and a client that goes away closes it. Everything in
between goes straight to the engine's process (`deployments.serve.ranks`), over a channel.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.scaling import KV_SHARE
from deployments.engine_config import EngineConfig
from deployments.serve.channel import Address
from deployments.serve.metrics import EngineMetrics
from deployments.serve.ranks import EngineActor, RankActor
from rapid.backend.waiting import TARGET_PATIENCE_S
from rapid.engine.messages import EngineStats, SequenceRequest
from rapid.errors import RapidError
from rapid.models.info import ModelInfo, RankPlacement

logger = logging.getLogger("ray.serve")

_LISTEN_EVERY_S = 1.0
_ANSWER_WITHIN_S = 5.0
_DOUBT_AFTER_S = 1.5
_DOCUMENTS = 64  # whose readers a replica is known for
_BEGINNING = 256  # tokens that tell documents apart


def document_of(request: SequenceRequest) -> str:
    """A name for what the prompt begins with: the next turn of a chat has the same. Empty for a short prompt."""
    if len(request.prompt) < _BEGINNING:
        return ""
    return hashlib.sha256(f"{request.salt} {request.prompt[:_BEGINNING]}".encode()).hexdigest()[:16]


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
