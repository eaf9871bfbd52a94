"""Engines and a retriever behind Serve deployments, as the decode loop sees them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Collection, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from deployments.serve.channel import Channel
from deployments.serve.engines import Ticket, document_of, engines_of
from deployments.serve.metrics import QueueMetrics
from rapid.backend.protocol import Lease, Retrieval, Role
from rapid.engine.messages import EngineStats, SequenceRequest
from rapid.errors import EngineLost, Overloaded, RapidError, RetrievalFailed
from rapid.models.info import ModelInfo
from rapid.speculation.learned import History
from retrieval import IndexProgress, RetrievalError

_RESUME_TIMEOUT_S = 300.0  # to find another engine when one is lost: a new replica has to load its model
_LEASE_TIMEOUT_S = 20.0  # to lease from one replica: a node that is gone does not answer, and Ray notices late
_OPTIONAL_TIMEOUT_S = 5.0  # for the first word of what a request can do without
_LATE_TICKET_TIMEOUT_S = 0.3  # for a ticket whose request is gone


class RayBackend:
    """Engines behind Serve deployments: a lease through Serve, everything after it straight to the engine's process."""

    def __init__(
        self,
        engines: dict[Role, DeploymentHandle],
        retriever: DeploymentHandle,
        *,
        overlap: bool,
        may_be_away: Collection[Role] = (),
    ) -> None:
        self.history = History()
        self.resume_timeout_s = _RESUME_TIMEOUT_S
        self.overlap = overlap
        self._engines, self._retriever, self._may_be_away = engines, retriever, may_be_away
        self._queue = QueueMetrics(engines)
        self._infos: dict[Role, ModelInfo] = {}
        self._actors: dict[Role, Any] = {}  # one that was there lately
        self._tasks: set[asyncio.Task[None]] = set()

    async def connect(self) -> None:
        """Waits for both models to be loaded."""
        for role in self._engines:
            await self._find(role)

    async def _find(self, role: Role) -> None:
        self._infos[role], self._actors[role] = await self._engines[role].address.remote()

    def info(self, role: Role) -> ModelInfo:
        return self._infos[role]

    async def stats(self) -> dict[Role, EngineStats]:
        """What the engines hold; asked of the actors, since a call through Serve waits while all places are leased.

        An engine that may be away is left out when it is: to ask Serve for it would bring it back.
        """
        held: dict[Role, EngineStats] = {}
        for role in self._engines:
            try:
                held[role] = await self._actors[role].stats.remote()
            except RayActorError:
                if role not in self._may_be_away:
                    await self._find(role)
                    held[role] = await self._actors[role].stats.remote()
        return held

    async def retrieve(self, contents: list[str], query: str, options: Any) -> Retrieval:
        stream = self._retriever.options(stream=True).retrieve.remote(contents, query, options)
        try:
            with _retrieving():
                async with asyncio.timeout(_OPTIONAL_TIMEOUT_S):
                    await anext(stream)
                retrieval: Retrieval = await anext(stream)
        except asyncio.CancelledError:
            stream.cancel()
            raise
        except TimeoutError as error:
            stream.cancel()
            raise RetrievalFailed(f"no retriever answered within {_OPTIONAL_TIMEOUT_S} s") from error
        return retrieval

    async def keep(self, text: str, chunk_tokens: int, tenant: str = "") -> AsyncIterator[IndexProgress]:
        stream = self._retriever.options(stream=True).keep.remote(text, chunk_tokens, tenant)
        try:
            with _retrieving():
                async for kept in stream:
                    yield kept
        finally:
            stream.cancel()

    async def delete(self, vectors: str) -> None:
        dropped = self._retriever.delete.remote(vectors)
        try:
            with _retrieving():
                async with asyncio.timeout(_LEASE_TIMEOUT_S):
                    await dropped
        except TimeoutError as error:
            dropped.cancel()
            raise RetrievalFailed(f"no retriever answered within {_LEASE_TIMEOUT_S} s") from error

    async def forget(self, tokens: list[int], salt: str = "") -> None:
        """Every engine of the application, whoever has asked it for something."""
        mine = engines_of(serve.get_replica_context().app_name)
        for name in await asyncio.to_thread(ray.util.list_named_actors):
            if name.startswith(mine):
                with suppress(ValueError, RayActorError):  # gone since, and what it held with it
                    engine = await asyncio.to_thread(ray.get_actor, name)
                    await engine.forget.remote(tokens, salt)

    @asynccontextmanager
    async def lease(self, role: Role, request: SequenceRequest) -> AsyncIterator[Lease]:
        handle = self._engines[role].options(stream=True, multiplexed_model_id=document_of(request.prompt))
        stream = handle.lease.remote(request)
        first = asyncio.ensure_future(anext(stream))
        try:
            resume_timeout_s = _LEASE_TIMEOUT_S if request.may_wait else _OPTIONAL_TIMEOUT_S
            with self._queue.waiting(role):
                while not (await asyncio.wait([first], timeout=resume_timeout_s))[0]:
                    if request.written or not request.may_wait:
                        raise Overloaded(f"no {role} had a place within {resume_timeout_s:g} s")
                    if not await self._is_there(role):
                        raise EngineLost(f"there is no {role}")
                    # Busy replicas are waited for in their queue.
            ticket: Ticket | RapidError = first.result()
        except BackPressureError as error:
            raise Overloaded(f"the {role}'s queue is full; try again shortly", status=429) from error
        except RayError as error:
            raise EngineLost(f"no {role} answers") from error
        except (asyncio.CancelledError, RapidError):
            self._abandon(stream, first)
            raise
        if isinstance(ticket, RapidError):
            raise ticket
        self._actors[role] = ticket.engine
        try:
            try:
                channel = await Channel.connect(ticket.address, ticket.lease_id)
            except OSError as error:
                raise EngineLost(f"the {role}'s engine cannot be reached: {error}") from error
            self._keep(_close_with(stream, channel))
            try:
                yield lease_over(channel, ticket.lease_id)
            finally:
                channel.close()
        finally:
            ticket.engine.close.remote(ticket.lease_id)  # which ends the stream too

    async def _is_there(self, role: Role) -> bool:
        """Whether any replica runs, busy as it may be. Serve itself would wait for one for ever."""
        handle = self._engines[role]
        status = await asyncio.to_thread(serve.status)
        found = status.applications[handle.app_name].deployments[handle.deployment_name]
        return found.replica_states.get("RUNNING", 0) > 0

    def _abandon(self, stream: Any, first: asyncio.Future[Any]) -> None:
        """Ends a lease whose ticket nobody waits for; one that is on its way already is given back by name."""

        async def give_back() -> None:
            done, _ = await asyncio.wait([first], timeout=_LATE_TICKET_TIMEOUT_S)
            stream.cancel()
            if done and not first.cancelled() and first.exception() is None and isinstance(first.result(), Ticket):
                first.result().engine.close.remote(first.result().lease_id)

        self._keep(give_back())

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Lets ``work`` go on behind a request; asyncio itself keeps no task alive."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@contextmanager
def _retrieving() -> Iterator[None]:
    """What goes wrong with the retriever, as one error."""
    try:
        yield
    except RetrievalError as error:
        # Across processes str() is the remote traceback; the first argument is still the message.
        raise RetrievalFailed(f"retrieval failed: {getattr(error, 'cause', error)}") from error
    except RayError as error:
        raise RetrievalFailed("the retriever is gone") from error


async def _close_with(stream: AsyncIterator[Any], channel: Channel) -> None:
    """A lease's stream ends with its sequence and fails with its replica: also when a whole node is gone, of which the
    connection alone would say nothing."""
    try:
        with suppress(Exception):
            await anext(stream, None)
    finally:
        channel.close()


def lease_over(channel: Channel, lease_id: str) -> Lease:
    """A lease whose calls go over ``channel``, each sent when it is made."""

    def call(method: str, *message: Any) -> Awaitable[Any]:
        return _or_lost(channel.call("call", lease_id, method, *message))

    return Lease(call)


async def _or_lost(answer: Awaitable[Any]) -> Any:
    try:
        return await answer
    except ConnectionError as error:
        raise EngineLost("the engine is gone") from error
