"""The Coordinator: turns a request into a prompt, runs the decode loop over leased engines, streams what comes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from deployments.config import AppConfig
from deployments.engines import Ticket, document_of
from deployments.protocol import Completion, Health
from rapid.backend import DraftHandle, Lease, Retrieval, Role
from rapid.control import Costs, DraftLimits
from rapid.engine import EngineStats
from rapid.errors import DraftLost, EngineLost, Overloaded, RapidError
from rapid.generate import generate
from rapid.model_info import ModelInfo
from rapid.request import Delta, Finish
from rapid.sampling import SamplingParams
from rapid.tasks import Draft, Prefilled, Verified
from rapid.tokenization import check_same_tokenizer, load_tokenizer
from retrieval import RetrievalError

_PATIENCE_FOR_ANOTHER_S = 180.0  # engine, when one is lost: a new replica has to load its model
_PATIENCE_S = 5.0  # with Serve, for a place that a request can do without
_ON_ITS_WAY_S = 0.3  # for a ticket, when the request that asked for it is gone


class RayBackend:
    """Engines behind Serve deployments: a lease through Serve, everything after it straight to the engine actor."""

    def __init__(self, engines: dict[Role, DeploymentHandle], retriever: DeploymentHandle, *, overlap: bool) -> None:
        self.costs = Costs()
        self.patience_s = _PATIENCE_FOR_ANOTHER_S
        self.overlap = overlap
        self._engines, self._retriever = engines, retriever
        self._addresses: dict[Role, tuple[ModelInfo, Any]] = {}
        self._abandoning: set[asyncio.Task[None]] = set()  # asyncio itself keeps no task alive

    async def connect(self) -> None:
        """Waits for both models to be loaded."""
        for role, engine in self._engines.items():
            self._addresses[role] = await engine.address.remote()

    def info(self, role: Role) -> ModelInfo:
        return self._addresses[role][0]

    async def stats(self) -> dict[Role, EngineStats]:
        """What the engines hold; asked of the actors, since a call through Serve waits while all places are leased."""
        roles = list(self._addresses)
        return dict(
            zip(roles, await asyncio.gather(*(self._addresses[r][1].stats.remote() for r in roles)), strict=True)
        )

    async def retrieve(self, contents: list[str], query: str, options: Any) -> Retrieval:
        try:
            retrieval: Retrieval = await self._retriever.retrieve.remote(contents, query, options)
        except RetrievalError as error:
            # Across processes str() is the remote traceback; the first argument is still the message.
            raise RapidError(f"retrieval failed: {error.cause}", code="retrieval_failed", status=503) from error
        except RayError as error:
            raise RapidError("the retriever is gone", code="retrieval_failed", status=503) from error
        return retrieval

    @asynccontextmanager
    async def lease(
        self,
        role: Role,
        prompt: list[int],
        max_new_tokens: int,
        sampling: SamplingParams,
        *,
        written: int = 0,
        may_wait: bool = True,
    ) -> AsyncIterator[Lease]:
        handle = self._engines[role].options(stream=True, multiplexed_model_id=document_of(prompt))
        stream = handle.lease.remote(prompt, max_new_tokens, sampling, written, may_wait)
        first = asyncio.ensure_future(anext(stream))
        try:
            async with asyncio.timeout(None if may_wait else _PATIENCE_S):
                ticket: Ticket | RapidError = await asyncio.shield(first)
        except TimeoutError as error:
            self._abandon(stream, first)
            raise Overloaded(f"no {role} had a place within {_PATIENCE_S} s") from error
        except BackPressureError as error:
            raise Overloaded(f"the {role}'s queue is full; try again shortly", status=429) from error
        except RayError as error:
            raise EngineLost(f"no {role} answers") from error
        except asyncio.CancelledError:
            self._abandon(stream, first)
            raise
        if isinstance(ticket, RapidError):
            raise ticket
        try:
            yield _RayLease(ticket)
        finally:
            ticket.engine.close.remote(ticket.lease_id)  # which ends the stream too

    def _abandon(self, stream: Any, first: asyncio.Future[Any]) -> None:
        """Ends a lease whose ticket nobody waits for; one that is on its way already is given back by name."""

        async def give_back() -> None:
            done, _ = await asyncio.wait([first], timeout=_ON_ITS_WAY_S)
            stream.cancel()
            if done and not first.cancelled() and first.exception() is None and isinstance(first.result(), Ticket):
                first.result().engine.close.remote(first.result().lease_id)

        task = asyncio.create_task(give_back())
        self._abandoning.add(task)
        task.add_done_callback(self._abandoning.discard)


class _RayLease:
    def __init__(self, ticket: Ticket) -> None:
        self._engine, self._id = ticket.engine, ticket.lease_id

    async def prefill(self) -> Prefilled:
        try:
            prefilled: Prefilled = await self._engine.prefill.remote(self._id)
        except RayActorError as error:
            raise EngineLost("the engine died while it read the prompt") from error
        return prefilled

    def propose(self, offset: int, tokens: list[int], limits: DraftLimits, draft_top_k: int) -> DraftHandle:
        draft: DraftHandle = self._engine.propose.remote(self._id, offset, tokens, limits, draft_top_k)
        return draft

    async def verify(self, draft: DraftHandle | Draft, rule: str, transfer_strength: float) -> Verified:
        # A draft that is still a reference is fetched by the target's engine from the drafter's, not by this process.
        try:
            verified: Verified = await self._engine.verify.remote(self._id, draft, rule, transfer_strength)
        except Exception as error:
            # A draft that failed fails the call it is an argument of; which of the two it was, only the draft can tell.
            if not isinstance(draft, Draft):
                await _raise_if_lost(draft)
            if isinstance(error, RayActorError):
                raise EngineLost("the engine died") from error
            raise
        return verified


async def _raise_if_lost(draft: DraftHandle) -> None:
    try:
        await draft
    except Exception as error:
        raise DraftLost(f"the drafter failed: {type(error).__name__}") from error


@serve.deployment
class Coordinator:
    """Holds the tokenizer and no model. Refuses to start when target and drafter do not share a tokenizer."""

    async def __init__(
        self, config: AppConfig, target: DeploymentHandle, drafter: DeploymentHandle, retriever: DeploymentHandle
    ) -> None:
        self._config = config
        self._backend = RayBackend({"target": target, "drafter": drafter}, retriever, overlap=config.overlaps)
        self._tokenizer = load_tokenizer(config.target.model)
        if config.drafting_engine.model != config.target.model:
            check_same_tokenizer(self._tokenizer, load_tokenizer(config.drafting_engine.model))
        await self._backend.connect()

    async def generate(self, completion: Completion) -> AsyncIterator[Delta | Finish | RapidError]:
        """Streams one completion, a `Delta` a round and a `Finish`; closing the stream frees everything it holds.

        What is wrong with the request, and not with the service, comes as the last item instead of being raised: Serve
        would log it as a failure of this replica.
        """
        try:
            # Tokenizing a whole book takes a second, and the other requests' rounds must go on meanwhile.
            request = await asyncio.to_thread(completion.read, self._tokenizer, self._config)
            async with aclosing(generate(request, self._backend)) as events:
                async for event in events:
                    yield event
        except RapidError as error:
            if error.status >= 500:
                raise
            yield error

    async def health(self) -> Health:
        """What each engine holds; raises when one does not answer."""
        try:
            stats = await self._backend.stats()
        except RayActorError:  # a replica was replaced, and its engine with it
            await self._backend.connect()
            stats = await self._backend.stats()
        return Health(
            status="ok",
            models={role: self._backend.info(role).name for role in stats},
            sequences={role: held.num_sequences for role, held in stats.items()},
            kv_bytes={role: held.kv_bytes for role, held in stats.items()},
        )
