"""The calls that an engine answers for one leased sequence, each with one message and one result.

The engine's own process and a connection from another process use the same class.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from rapid.engine.engine import Engine
from rapid.engine.messages import (
    DraftRequest,
    PrefillResult,
    Pulse,
    RefineRequest,
    ScoreRequest,
    ScoreResult,
    SelfDraftRequest,
    VerifyRequest,
)
from rapid.engine.propose import drafted_ahead, propose
from rapid.engine.score import score
from rapid.engine.self_draft import draft_over_view, refine
from rapid.engine.sequence import Sequence, Task
from rapid.engine.verify import prefill, verify_draft
from rapid.speculation.draft import Draft, VerifyResult

T = TypeVar("T")
CALLS = frozenset({"prefill", "propose", "drafted_ahead", "draft_over_view", "refine", "verify", "score", "pulse"})


class LeasedSequence:
    """``sequence`` of ``engine``, for the request that leased it.

    Calls start in order, at once when they are made; several may be in progress at the same time.
    """

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self._engine, self.sequence = engine, sequence

    def call(self, method: str, *message: Any) -> Awaitable[Any]:
        """Makes the call named ``method``, which came over a connection.

        Raises:
            ValueError: there is no such call.
        """
        if method not in CALLS:
            raise ValueError(f"a lease has no call {method!r}")
        answer: Awaitable[Any] = getattr(self, method)(*message)
        return answer

    def prefill(self) -> Awaitable[PrefillResult]:
        return self._answer(prefill(self.sequence))

    def propose(self, request: DraftRequest) -> Awaitable[Draft]:
        model = self._engine.model
        task = propose(self.sequence, request, model.info.eos_token_ids, model.draft_head)
        return self._answer(task)

    def drafted_ahead(self) -> Awaitable[Draft | None]:
        return asyncio.ensure_future(drafted_ahead(self.sequence.drafting_ahead))

    def draft_over_view(self, request: SelfDraftRequest) -> Awaitable[Draft]:
        task = draft_over_view(self.sequence, request, self._engine.model.info.eos_token_ids)
        return self._answer(task)

    def refine(self, request: RefineRequest) -> Awaitable[Draft]:
        task = refine(self.sequence, request, self._engine.model.info.eos_token_ids)
        return self._answer(task)

    def verify(self, request: VerifyRequest) -> Awaitable[VerifyResult]:
        return self._answer(verify_draft(self.sequence, request))

    def score(self, request: ScoreRequest) -> Awaitable[ScoreResult]:
        return self._answer(score(self.sequence, request))

    async def pulse(self) -> Pulse:
        return self._engine.pulse()

    def _answer(self, task: Task[T]) -> Awaitable[T]:
        return asyncio.wrap_future(self._engine.submit(task, self.sequence))
