"""Target and Drafter: a Serve replica that leases sequences, and the engine actor that holds the model and its KV.

A lease is a stream. Its first item says where the sequence is; it then stays open for as long as the request lives, so
that Serve's count of ongoing requests is the number of sequences, and a client that goes away closes it. Everything in
between goes straight to the engine actor.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.config import EngineConfig
from rapid.control import DraftLimits
from rapid.engine import Engine, EngineStats
from rapid.errors import RapidError
from rapid.model_info import ModelInfo
from rapid.sampling import SamplingParams
from rapid.sequence import Sequence
from rapid.tasks import Draft, Prefilled, Verified, prefill, propose, verify_draft

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Ticket:
    """A lease: sequence ``lease_id`` of ``engine``, kept by replica ``replica_id``."""

    lease_id: str
    replica_id: str
    engine: Any  # the engine actor's handle


class EngineActor:
    """One model, its engine and the open sequences. All calls but the first name a lease."""

    def __init__(self, config: EngineConfig) -> None:
        from deployments.assembly import build_engine

        self._engine: Engine = build_engine(config)
        self._leases: dict[str, Sequence] = {}
        self._opening: dict[str, Future[Sequence]] = {}

    async def info(self) -> ModelInfo:
        return self._engine.model.info

    async def stats(self) -> EngineStats:
        return self._engine.stats()

    async def open(
        self, lease_id: str, prompt: list[int], max_new_tokens: int, sampling: SamplingParams, may_wait: bool
    ) -> None:
        opening = self._opening[lease_id] = self._engine.open(prompt, max_new_tokens, sampling, may_wait=may_wait)
        try:
            self._leases[lease_id] = await asyncio.wrap_future(opening)
        except asyncio.CancelledError:
            self._engine.abandon(opening)
            raise
        finally:
            del self._opening[lease_id]

    async def prefill(self, lease_id: str) -> Prefilled:
        return await self._run(prefill(self._sequence(lease_id)))

    async def propose(
        self, lease_id: str, offset: int, tokens: list[int], limits: DraftLimits, draft_top_k: int
    ) -> Draft:
        eos = self._engine.model.info.eos_token_ids
        return await self._run(propose(self._sequence(lease_id), offset, tokens, limits, draft_top_k, eos))

    async def verify(self, lease_id: str, draft: Draft, rule: str, transfer_strength: float) -> Verified:
        return await self._run(verify_draft(self._sequence(lease_id), draft, rule, transfer_strength))

    async def close(self, lease_id: str) -> None:
        """Frees the sequence, or ends its wait for room; harmless when it is already gone."""
        if lease_id in self._opening:
            self._engine.abandon(self._opening[lease_id])
        sequence = self._leases.pop(lease_id, None)
        if sequence is not None:
            self._engine.close(sequence)

    async def ended(self, lease_id: str) -> None:
        """Returns when the sequence is closed, by whomever."""
        sequence = self._leases.get(lease_id)
        if sequence is not None:
            await asyncio.wrap_future(sequence.ended)
            self._leases.pop(lease_id, None)

    def _sequence(self, lease_id: str) -> Sequence:
        sequence = self._leases.get(lease_id)
        return self._engine.get(sequence.id if sequence else 0)

    async def _run(self, task: Any) -> Any:
        return await asyncio.wrap_future(self._engine.submit(task))


@serve.deployment
class EngineReplica:
    """Starts one engine actor in its own placement group and leases its sequences. Target and Drafter are both this."""

    async def __init__(self, config: EngineConfig) -> None:
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        self._engine: Any = (
            ray.remote(EngineActor)
            .options(
                num_cpus=config.num_cpus,
                num_gpus=config.num_gpus,
                max_concurrency=1000,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    ray.util.get_current_placement_group(), placement_group_bundle_index=1
                ),
            )
            .remote(config)
        )
        # Waiting here keeps the replica, and so the application, out of service until the model is loaded.
        self._info: ModelInfo = await self._engine.info.remote()
        logger.info("%s loaded: %s on %s", config.model, self._info.dtype, self._info.device)

    async def lease(
        self, prompt: list[int], max_new_tokens: int, sampling: SamplingParams, may_wait: bool
    ) -> AsyncIterator[Ticket | RapidError]:
        """Opens a sequence; closing this stream, for whatever reason, frees it.

        Where there is no room for it the first item is the error: raised, Serve would log it as this replica's failure.
        """
        # The id is made here and not by the engine: a lease cancelled while it opens can still be closed by name.
        lease_id = uuid.uuid4().hex
        try:
            try:
                await self._engine.open.remote(lease_id, prompt, max_new_tokens, sampling, may_wait)
            except RapidError as error:
                yield error
                return
            yield Ticket(lease_id, self._replica_id, self._engine)
            await self._engine.ended.remote(lease_id)
        finally:
            self._engine.close.remote(lease_id)

    async def address(self) -> tuple[ModelInfo, Any]:
        """The loaded model and the engine actor's handle, for calls that must not wait behind leases."""
        return self._info, self._engine

    async def check_health(self) -> None:
        await self._engine.info.remote()
