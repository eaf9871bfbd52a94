"""Engines and a retriever behind Serve deployments, as the decode loop sees them."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.heartbeat import heard
from deployments.serve.avoided import avoid, trust
from deployments.serve.channel import Channel
from deployments.serve.engine_actors import EngineActors, asked
from deployments.serve.engines import Doubt, Ticket, document_of
from deployments.serve.metrics import QueueMetrics
from deployments.serve.ray_errors import understood
from rapid.backend.breaker import Breaker
from rapid.backend.protocol import Lease, Retrieval, Role, Vitals
from rapid.backend.quarantine import Quarantine
from rapid.backend.waiting import DRAFTER_PATIENCE_S, QUEUE_LIMIT_S, TARGET_PATIENCE_S, retrieval_limit_s
from rapid.engine.messages import EngineStats, SequenceRequest
from rapid.errors import EngineHung, EngineLost, Overloaded, RapidError, RetrievalFailed
from rapid.models.info import ModelInfo
from rapid.speculation.learned import History
from retrieval import IndexProgress, RetrievalError, TextLengths

_RESUME_TIMEOUT_S = 300.0  # to find another engine when one is lost: a new replica has to load its model
_LEASE_TIMEOUT_S = 5.0  # to lease from one replica: a node that is gone does not answer, and Ray notices late
_OPTIONAL_TIMEOUT_S = 1.8  # for the next word of what a request can do without, which may cost it two seconds
_LATE_TICKET_TIMEOUT_S = 0.3  # for a ticket whose request is gone
_NEEDED_TIMEOUT_S = 20.0  # for the retriever's next word, where there is nothing to do without it


class RayBackend:
    """Engines behind Serve deployments: a lease through Serve, everything after it straight to the engine's process.

    ``least`` is how many engines of a role there should always be: one, where nothing is said.
    """

    def __init__(
        self,
        engines: dict[Role, DeploymentHandle],
        retriever: DeploymentHandle,
        *,
        overlap: bool,
        is_colocated: bool = False,
        least: Mapping[Role, int] = MappingProxyType({}),
    ) -> None:
        self.history = History()
        self.quarantine = Quarantine()
        self.resume_timeout_s = _RESUME_TIMEOUT_S
        self.overlap, self.is_colocated = overlap, is_colocated
        self._engines, self._retriever, self._least = engines, retriever, least
        self._hanging = {role: Breaker() for role in engines}
        self._retrieving, self._computing = Breaker(), Breaker()  # apart: their callers wait for words differently long
        self._queue = QueueMetrics(engines)
        self._infos: dict[Role, ModelInfo] = {}
        self._actors = EngineActors()
        self._tasks: set[asyncio.Task[None]] = set()
        self._asking_serve: asyncio.Future[Any] | None = None

    async def connect(self) -> None:
        """Waits for both models to be loaded."""
        for role, engine in self._engines.items():
            self._infos[role] = await engine.info.remote()

    def info(self, role: Role) -> ModelInfo:
        return self._infos[role]

    async def vitals(self) -> Vitals:
        """Asked of all engine actors, since a call through Serve waits while all places are leased.

        An engine that may be away is no problem when it is: to ask Serve for it would bring it back.
        """
        await self._actors.find()
        names = {role: self._engines[role].deployment_name for role in self._engines}
        *found, silent = await asyncio.gather(
            *(self._actors.stats(name) for name in names.values()), self._retriever_is_silent()
        )
        engines: dict[Role, list[EngineStats]] = {}
        problems: dict[str, str] = {"retriever": silent} if silent else {}
        for role, (stats, problem) in zip(names, found, strict=True):
            least = self._least.get(role, 1)
            if stats:
                engines[role] = stats
            if problem is None and len(stats) < least:
                problem = f"there are {len(stats)} of {least} engines" if stats else "there is no engine"
            if problem is not None:
                problems[role] = problem
        return Vitals(engines, problems)

    async def _retriever_is_silent(self) -> str | None:
        try:
            await asked("the retriever", self._retriever.answers.remote)
        except RapidError as error:
            return error.message
        return None

    async def retrieve(self, contents: list[str], query: str, options: Any) -> Retrieval:
        asked = ("retrieve", contents, query, options)
        retrieval: Retrieval = await self._of_retriever(self._retrieving, _OPTIONAL_TIMEOUT_S, contents, *asked)
        return retrieval

    async def embed(self, texts: list[str], salt: str = "", client: str = "") -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = await self._computed(texts, client or salt, "embed", texts, salt)
        return vectors

    async def text_lengths(self, texts: list[str], client: str = "") -> TextLengths:
        lengths: TextLengths = await self._computed(texts, client, "lengths", texts)
        return lengths

    async def rerank(self, query: str, texts: list[str], salt: str = "", client: str = "") -> list[float]:
        read = [text for each in texts for text in (query, each)]
        scores: list[float] = await self._computed(read, client or salt, "rerank", query, texts, salt)
        return scores

    async def _computed(self, read: list[str], *asked: Any) -> Any:
        return await self._of_retriever(self._computing, _NEEDED_TIMEOUT_S, read, "compute", *asked)

    async def _of_retriever(self, breaker: Breaker, silent_s: float, read: list[str], method: str, *args: Any) -> Any:
        """Each word of the retriever is waited for, not the whole answer: a long document takes its time."""
        if refusal := breaker.refusal():
            raise refusal
        stream = getattr(self._retriever.options(stream=True), method).remote(*args)
        words = heard(stream, first_s=silent_s, silent_s=silent_s)
        limit_s = retrieval_limit_s(read)
        try:
            with _retrieving(breaker):
                try:
                    async with asyncio.timeout(limit_s) as whole, aclosing(words):
                        answer = await anext(words)
                except TimeoutError:
                    if not whole.expired():
                        raise
                    # It was not silent, so others need not do without it.
                    raise RetrievalFailed(f"the retriever has worked for {limit_s:.0f} s and is not done") from None
        except (asyncio.CancelledError, RetrievalFailed):
            stream.cancel()
            raise
        breaker.succeeded()
        return answer

    async def keep(self, text: str, chunk_tokens: int, tenant: str = "") -> AsyncIterator[IndexProgress]:
        stream = self._retriever.options(stream=True).keep.remote(text, chunk_tokens, tenant)
        try:
            with _retrieving(self._retrieving):
                async for kept in heard(stream, first_s=_NEEDED_TIMEOUT_S, silent_s=_NEEDED_TIMEOUT_S):
                    yield kept
        finally:
            stream.cancel()

    async def delete(self, vectors: str) -> None:
        dropped = self._retriever.delete.remote(vectors)
        with _retrieving(self._retrieving):
            try:
                async with asyncio.timeout(_NEEDED_TIMEOUT_S):
                    await dropped
            except TimeoutError:
                dropped.cancel()
                raise

    async def forget(self, tokens: list[int], salt: str = "") -> None:
        """Every engine of the application, whoever has asked it for something."""
        await self._actors.forget(tokens, salt)

    @asynccontextmanager
    async def lease(self, role: Role, request: SequenceRequest) -> AsyncIterator[Lease]:
        breaker = self._hanging[role]
        if not request.may_wait and (refusal := breaker.refusal()):
            raise refusal
        try:
            stream, ticket = await self._ticket(role, request)
        except (EngineHung, Overloaded) as error:
            breaker.failed(error)
            raise

        def hung(error: EngineHung) -> None:
            avoid(ticket.replica)
            breaker.failed(error)

        def answered() -> None:
            trust(ticket.replica)
            breaker.succeeded()

        try:
            self._actors.has_leased(ticket.name)
            try:
                within_s = _LEASE_TIMEOUT_S if request.may_wait else _OPTIONAL_TIMEOUT_S
                channel = await Channel.connect(ticket.address, ticket.lease_id, within_s)
            except OSError as error:
                lost = EngineHung(f"the {role}'s engine cannot be reached: {error or 'no answer'}")
                hung(lost)
                raise lost from error
            self._keep(_close_with(stream, channel))
            patience_s = TARGET_PATIENCE_S if request.may_wait else DRAFTER_PATIENCE_S
            lease = lease_over(channel)
            try:
                yield replace(
                    lease, prompt_tokens=len(request.prompt), patience_s=patience_s, hung=hung, answered=answered
                )
            finally:
                channel.close()
        finally:  # also where the request was cancelled while the channel was made, of which the engine knows nothing
            ticket.engine.close.remote(ticket.lease_id)  # which ends the stream too

    async def _ticket(self, role: Role, request: SequenceRequest) -> tuple[Any, Ticket]:
        """A place on one of the engines, and the stream that holds it."""
        # The reader of a document is preferred, but not where it may be what hangs.
        document = "" if self._hanging[role].is_open else document_of(request)
        handle = self._engines[role].options(stream=True, multiplexed_model_id=document)
        stream = handle.lease.remote(request)
        first = asyncio.ensure_future(anext(stream))
        started = time.monotonic()
        try:
            timeout_s = _LEASE_TIMEOUT_S if request.may_wait else _OPTIONAL_TIMEOUT_S
            with self._queue.waiting(role):
                while not (await asyncio.wait([first], timeout=timeout_s))[0]:
                    if request.written or not request.may_wait:
                        raise Overloaded(f"no {role} had a place within {timeout_s:g} s")
                    if not await self._is_there(role):
                        raise EngineLost(f"there is no {role}")
                    # Busy replicas are waited for in their queue.
                    if time.monotonic() - started > QUEUE_LIMIT_S:
                        raise Overloaded(f"no {role} had a place within {QUEUE_LIMIT_S:g} s", status=429)
            with understood(f"the {role}", EngineLost):
                ticket: Ticket | Doubt | RapidError = first.result()
            if isinstance(ticket, Doubt):
                avoid(ticket.replica)
                raise EngineHung(f"an engine of the {role} is not well: {ticket.reason}")
        except (asyncio.CancelledError, RapidError):
            self._abandon(stream, first)
            raise
        if isinstance(ticket, RapidError):
            raise ticket
        return stream, ticket

    async def _is_there(self, role: Role) -> bool:
        """Whether any replica runs, busy as it may be. Serve itself would wait for one for ever.

        Serve's controller may hang as well. Then one thread waits for it, and a running replica is taken for granted.
        """
        handle = self._engines[role]
        if self._asking_serve is None or self._asking_serve.done():
            self._asking_serve = asyncio.ensure_future(asyncio.to_thread(serve.status))
        if not (await asyncio.wait([self._asking_serve], timeout=_OPTIONAL_TIMEOUT_S))[0]:
            return True
        found = self._asking_serve.result().applications[handle.app_name].deployments[handle.deployment_name]
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
def _retrieving(breaker: Breaker) -> Iterator[None]:
    """What goes wrong with the retriever, as one error. The breaker learns of what kept the caller waiting."""
    try:
        with understood("the retriever", RetrievalFailed):
            try:
                yield
            except RetrievalError as error:
                # Across processes str() is the remote traceback; the first argument is still the message.
                raise RetrievalFailed(f"retrieval failed: {getattr(error, 'cause', error)}") from error
    except RetrievalFailed as error:
        if isinstance(error.__cause__, TimeoutError):
            breaker.failed(error)
        raise


async def _close_with(stream: AsyncIterator[Any], channel: Channel) -> None:
    """A lease's stream ends with its sequence and fails with its replica: also when a whole node is gone, of which the
    connection alone would say nothing."""
    try:
        with suppress(Exception):
            await anext(stream, None)
    finally:
        channel.close()


def lease_over(channel: Channel) -> Lease:
    """A lease whose calls go over ``channel``, each sent when it is made."""
    return Lease(partial(channel.call, "call"))
