"""The backend of one process, which calls engines and a retriever directly. The command line and the tests use it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rapid.backend.breaker import Breaker
from rapid.backend.protocol import Lease, Retrieval, Role, Vitals
from rapid.backend.quarantine import Quarantine
from rapid.backend.waiting import (
    QUEUE_LIMIT_S,
    TARGET_PATIENCE_S,
    prefill_limit_s,
    retrieval_limit_s,
    while_it_goes_on,
)
from rapid.engine.engine import Engine
from rapid.engine.lease import LeasedSequence
from rapid.engine.messages import Pulse, SequenceRequest
from rapid.engine.sequence import Sequence
from rapid.errors import EngineHung, RetrievalFailed
from rapid.models.info import ModelInfo
from rapid.speculation.learned import History
from rapid.text.tokenizer import check_same_tokenizer

_REPORT_EVERY_S = 0.2

Embed = Callable[[list[str], str], NDArray[np.float32]]  # texts, salt
Retrieve = Callable[[list[str], str, Any], Retrieval]
OnPrefill = Callable[[Role, int, int], None]


class LocalBackend:
    """Two engines (or one engine in both roles) and a retriever in this process.

    The backend calls ``on_prefill(role, tokens done, tokens in all)`` a few times a second during a prefill.

    Raises:
        ModelMismatch: the two models do not share a tokenizer.
    """

    def __init__(
        self,
        target: Engine,
        drafter: Engine,
        retrieve: Retrieve,
        *,
        embed: Embed | None = None,
        overlap: bool = False,
        on_prefill: OnPrefill = lambda *_: None,
    ) -> None:
        if target.model.tokenizer and drafter.model.tokenizer:
            check_same_tokenizer(target.model.tokenizer, drafter.model.tokenizer)
        self.history = History()
        self.quarantine = Quarantine()
        self._drafting, self._retrieving = Breaker(), Breaker()
        self.resume_timeout_s = 0.0
        self.overlap, self.is_colocated = overlap, drafter is target
        target.gathers = drafter is not target  # both compute on one thread
        self._engines: dict[Role, Engine] = {"target": target, "drafter": drafter}
        self._retrieve, self._embed = retrieve, embed
        self._on_prefill = on_prefill

    def info(self, role: Role) -> ModelInfo:
        return self._engines[role].model.info

    async def vitals(self) -> Vitals:
        engines = {role: [engine.stats()] for role, engine in self._engines.items()}
        stuck = {role: engine.pulse().problem(TARGET_PATIENCE_S) for role, engine in self._engines.items()}
        return Vitals(engines, {role: problem for role, problem in stuck.items() if problem})

    async def retrieve(self, contents: list[str], query: str, options: Any) -> Retrieval:
        if refusal := self._retrieving.refusal():
            raise refusal
        limit_s = retrieval_limit_s(contents)
        try:
            async with asyncio.timeout(limit_s):
                retrieval = await asyncio.to_thread(self._retrieve, contents, query, options)
        except Exception as error:  # the retriever has errors of its own
            failure = RetrievalFailed(f"retrieval failed: {str(error) or f'no answer in {limit_s:.0f} s'}")
            if isinstance(error, TimeoutError):
                self._retrieving.failed(failure)
            raise failure from error
        self._retrieving.succeeded()
        return retrieval

    async def embed(self, texts: list[str], salt: str = "") -> NDArray[np.float32]:
        if self._embed is None:
            raise RetrievalFailed("there is no embedder in this process")
        limit_s = retrieval_limit_s(texts)
        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.to_thread(self._embed, texts, salt)
        except Exception as error:
            failure = str(error) or f"no answer in {limit_s:.0f} s"
            raise RetrievalFailed(f"embedding failed: {failure}") from error

    async def forget(self, tokens: list[int], salt: str = "") -> None:
        for engine in set(self._engines.values()):
            forgetting = asyncio.wrap_future(engine.forget(tokens, salt))
            await while_it_goes_on(
                forgetting, _pulse_of(engine), patience_s=TARGET_PATIENCE_S, limit_s=prefill_limit_s(len(tokens))
            )

    @asynccontextmanager
    async def lease(self, role: Role, request: SequenceRequest) -> AsyncIterator[Lease]:
        engine = self._engines[role]
        breaker = self._drafting if role == "drafter" and not request.may_wait else None
        if breaker and (refusal := breaker.refusal()):
            raise refusal
        # A drafter that shares the process shares its cores with the target: its slow pass is rarely a hang.
        patience_s = TARGET_PATIENCE_S
        opened = engine.open(request)
        waiting = asyncio.wrap_future(opened)
        try:
            sequence = await while_it_goes_on(waiting, _pulse_of(engine), patience_s=patience_s, limit_s=QUEUE_LIMIT_S)
        except (asyncio.CancelledError, EngineHung) as error:
            if breaker and isinstance(error, EngineHung):
                breaker.failed(error)
            engine.abandon(opened)
            raise
        leased = LeasedSequence(engine, sequence)

        def call(method: str, *message: Any) -> Awaitable[Any]:
            answer = leased.call(method, *message)
            return self._report(role, sequence, answer) if method == "prefill" else answer

        outcomes = (breaker.failed, breaker.succeeded) if breaker else ()
        try:
            yield Lease(call, len(request.prompt), patience_s, *outcomes)
        finally:
            engine.close(sequence)

    def _report(self, role: Role, sequence: Sequence, answer: Awaitable[Any]) -> Awaitable[Any]:
        """The ``answer`` to a prefill, whose progress is reported.

        It is no coroutine around the answer: one that is cancelled before its first step would leave the answer to
        nobody.
        """
        running = asyncio.ensure_future(answer)

        def report() -> None:
            self._on_prefill(role, sequence.cache.length, len(sequence.prompt) - 1)

        async def report_on() -> None:
            while True:
                await asyncio.sleep(_REPORT_EVERY_S)
                report()

        def ended(done: asyncio.Future[Any]) -> None:
            reporting.cancel()
            if not done.cancelled():
                report()

        reporting = asyncio.create_task(report_on())
        running.add_done_callback(ended)
        return running


def _pulse_of(engine: Engine) -> Callable[[], Awaitable[Pulse]]:
    async def pulse() -> Pulse:
        return engine.pulse()

    return pulse
