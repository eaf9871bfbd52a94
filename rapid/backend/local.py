"""The backend of one process: engines and a retriever called directly. The command line and the tests run on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from rapid.backend.protocol import DraftHandle, Lease, Retrieval, Role
from rapid.engine.engine import Engine, EngineStats
from rapid.engine.propose import drafted_ahead, propose
from rapid.engine.sequence import Sequence, SequenceRequest
from rapid.engine.verify import prefill, verify_draft
from rapid.errors import DraftLost, RetrievalFailed
from rapid.models.info import ModelInfo
from rapid.speculation.controller import Costs
from rapid.speculation.draft import Draft, DraftLimits, PrefillResult, VerifyResult
from rapid.text.tokenizer import check_same_tokenizer

Retrieve = Callable[[list[str], str, Any], Retrieval]
OnPrefill = Callable[[Role, int, int], None]


class LocalBackend:
    """Two engines (or one engine in both roles) and a retriever in this process.

    ``on_prefill(role, tokens done, tokens in all)`` is called a few times a second while a prompt is read.

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
        self.costs = Costs()
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

    async def forget(self, tokens: list[int]) -> None:
        for engine in set(self._engines.values()):
            await asyncio.wrap_future(engine.forget(tokens))

    @asynccontextmanager
    async def lease(self, role: Role, opening: SequenceRequest) -> AsyncIterator[Lease]:
        engine = self._engines[role]
        opened = engine.open(opening)
        try:
            sequence = await asyncio.wrap_future(opened)
        except asyncio.CancelledError:
            engine.abandon(opened)
            raise
        try:
            yield _LocalLease(role, engine, sequence, self._on_prefill)
        finally:
            engine.close(sequence)


class _LocalLease:
    def __init__(self, role: Role, engine: Engine, sequence: Sequence, on_prefill: OnPrefill) -> None:
        self._role, self._engine, self._sequence, self._on_prefill = role, engine, sequence, on_prefill

    async def prefill(self) -> PrefillResult:
        running = asyncio.wrap_future(self._engine.submit(prefill(self._sequence)))
        try:
            while not running.done():
                await asyncio.wait([running], timeout=0.2)
                self._on_prefill(self._role, self._sequence.cache.length, len(self._sequence.prompt) - 1)
            return running.result()
        finally:
            running.cancel()  # nobody waits for it any more; closing the sequence ends the work

    def propose(self, offset: int, tokens: list[int], limits: DraftLimits, draft_top_k: int) -> DraftHandle:
        eos = self._engine.model.info.eos_token_ids
        task = propose(self._sequence, offset, tokens, limits, draft_top_k, eos)
        return asyncio.wrap_future(self._engine.submit(task))

    def ahead(self) -> Awaitable[Draft | None]:
        return asyncio.ensure_future(drafted_ahead(self._sequence.drafting_ahead))

    async def verify(self, draft: DraftHandle | Draft, rule: str, transfer_strength: float) -> VerifyResult:
        try:
            draft = draft if isinstance(draft, Draft) else await draft
        except Exception as error:
            raise DraftLost(f"the drafter failed: {error}") from error
        task = verify_draft(self._sequence, draft, rule, transfer_strength)
        return await asyncio.wrap_future(self._engine.submit(task))
