"""The backend of one process, which calls engines and a retriever directly. The command line and the tests use it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from rapid.backend.protocol import Lease, Retrieval, Role
from rapid.engine.engine import Engine
from rapid.engine.lease import LeasedSequence
from rapid.engine.messages import EngineStats, SequenceRequest
from rapid.engine.sequence import Sequence
from rapid.errors import RetrievalFailed
from rapid.models.info import ModelInfo
from rapid.speculation.learned import History
from rapid.text.tokenizer import check_same_tokenizer

_REPORT_EVERY_S = 0.2

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
        overlap: bool = False,
        on_prefill: OnPrefill = lambda *_: None,
    ) -> None:
        if target.model.tokenizer and drafter.model.tokenizer:
            check_same_tokenizer(target.model.tokenizer, drafter.model.tokenizer)
        self.history = History()
        self.resume_timeout_s = 0.0
        self.overlap = overlap
        self._engines: dict[Role, Engine] = {"target": target, "drafter": drafter}
        self._retrieve = retrieve
        self._on_prefill = on_prefill

    def info(self, role: Role) -> ModelInfo:
        return self._engines[role].model.info

    async def stats(self) -> dict[Role, EngineStats]:
        return {role: engine.stats() for role, engine in self._engines.items()}

    async def retrieve(self, contents: list[str], query: str, options: Any) -> Retrieval:
        try:
            return await asyncio.to_thread(self._retrieve, contents, query, options)
        except Exception as error:  # the retriever has errors of its own
            raise RetrievalFailed(f"retrieval failed: {error}") from error

    async def forget(self, tokens: list[int], salt: str = "") -> None:
        for engine in set(self._engines.values()):
            await asyncio.wrap_future(engine.forget(tokens, salt))

    @asynccontextmanager
    async def lease(self, role: Role, request: SequenceRequest) -> AsyncIterator[Lease]:
        engine = self._engines[role]
        opened = engine.open(request)
        try:
            sequence = await asyncio.wrap_future(opened)
        except asyncio.CancelledError:
            engine.abandon(opened)
            raise
        leased = LeasedSequence(engine, sequence)

        def call(method: str, *message: Any) -> Awaitable[Any]:
            answer = leased.call(method, *message)
            return self._report(role, sequence, answer) if method == "prefill" else answer

        try:
            yield Lease(call)
        finally:
            engine.close(sequence)

    async def _report(self, role: Role, sequence: Sequence, answer: Awaitable[Any]) -> Any:
        """Waits for a prefill, and reports its progress."""
        running = asyncio.ensure_future(answer)
        try:
            while not running.done():
                await asyncio.wait([running], timeout=_REPORT_EVERY_S)
                self._on_prefill(role, sequence.cache.length, len(sequence.prompt) - 1)
            return running.result()
        finally:
            running.cancel()  # closing the sequence ends the work
