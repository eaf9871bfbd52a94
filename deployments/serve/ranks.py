"""The processes of an engine: the actor that holds the model, its KV and the open sequences, and its other ranks."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import ray

from deployments.engine_config import EngineConfig
from deployments.serve.channel import Address, Listener
from deployments.serve.worker import SWITCH_INTERVAL_S
from rapid.engine.messages import EngineStats, Pulse, SequenceRequest
from rapid.models.info import ModelInfo, RankPlacement

if TYPE_CHECKING:  # an engine's replica names these actors too, and only their processes load torch
    from rapid.engine.engine import Engine
    from rapid.engine.lease import LeasedSequence
    from rapid.engine.sequence import Sequence


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
        sys.setswitchinterval(SWITCH_INTERVAL_S)
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

    def call(self, lease_id: str, method: str, *message: Any) -> Awaitable[Any]:
        """One call of a lease (`rapid.engine.lease.LeasedSequence`).

        Raises:
            SequenceClosed: the sequence was closed, or expired.
        """
        leased = self._leases.get(lease_id)
        self._engine.get(leased.sequence.id if leased else 0)  # which is in use again
        assert leased is not None
        return self._pulse(leased) if method == "pulse" else leased.call(method, *message)

    async def _pulse(self, leased: LeasedSequence) -> Pulse:
        await self._hear_all_ranks()
        return await leased.pulse()

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
