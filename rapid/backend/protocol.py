"""Where the models and the retriever are, as the decode loop sees them."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, Protocol

from rapid.engine.engine import EngineStats
from rapid.engine.sequence import SequenceRequest
from rapid.models.info import ModelInfo
from rapid.speculation.controller import Costs
from rapid.speculation.draft import Draft, DraftLimits, PrefillResult, VerifyResult
from rapid.text.prompts import RetrievedText

Role = Literal["target", "drafter"]
DraftHandle = Awaitable[Draft]


class RetrievedChunk(RetrievedText, Protocol):
    """A chunk of the context: ``position`` counts all chunks in document order, ``score`` is the cosine similarity.

    Its text is ``contents[content][start:end]``, in code points.
    """

    @property
    def position(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def score(self) -> float: ...


class Retrieval(Protocol):
    """A retriever's answer: the chunks it kept, in document order, and token counts."""

    @property
    def chunks(self) -> Sequence[RetrievedChunk]: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def retrieved_tokens(self) -> int: ...


class Lease(Protocol):
    """One sequence on one engine, for as long as the context manager that gave it stays open."""

    async def prefill(self) -> PrefillResult: ...
    def propose(self, offset: int, tokens: list[int], limits: DraftLimits, draft_top_k: int) -> DraftHandle: ...
    def ahead(self) -> Awaitable[Draft | None]:
        """What the latest `propose` drafts ahead (`rapid.engine.verify.drafted_ahead`)."""
        ...

    async def verify(self, draft: DraftHandle | Draft, rule: str, transfer_strength: float) -> VerifyResult:
        """One round (`rapid.engine.verify.verify_draft`).

        Raises:
            DraftLost: the draft did not come; nothing was changed.
            EngineLost: this lease's engine is gone.
        """
        ...


class Backend(Protocol):
    """``costs`` is what rounds of earlier requests took; a request leaves its own there.

    ``resume_timeout_s`` is for how long another engine is looked for when one is lost, 0 where there is no other. With
    ``overlap`` drafters draft on while the target verifies.
    """

    costs: Costs
    resume_timeout_s: float
    overlap: bool

    def info(self, role: Role) -> ModelInfo: ...
    async def stats(self) -> dict[Role, EngineStats]:
        """What the engines hold that are there."""
        ...

    async def retrieve(self, contents: list[str], query: str, options: Any) -> Retrieval:
        """What of ``contents`` matters to ``query``.

        Raises:
            RetrievalFailed: nobody can tell now.
        """
        ...

    async def forget(self, tokens: list[int]) -> None:
        """Drops what the engines have cached of a text of these ``tokens``."""
        ...

    def lease(self, role: Role, opening: SequenceRequest) -> AbstractAsyncContextManager[Lease]:
        """A sequence on one of the engines.

        Raises:
            Overloaded: there is no room, and it may not wait or too many do.
            EngineLost: no engine answers.
        """
        ...
