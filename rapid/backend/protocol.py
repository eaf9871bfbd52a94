"""Where the models and the retriever are, as the decode loop sees them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, Protocol

from rapid.engine.messages import DraftRequest, EngineStats, PrefillResult, SequenceRequest, VerifyRequest
from rapid.models.info import ModelInfo
from rapid.speculation.controller import Costs
from rapid.speculation.draft import Draft, VerifyResult
from rapid.text.prompts import RetrievedText

Role = Literal["target", "drafter"]
Call = Callable[..., Awaitable[Any]]  # (method, message) → result


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


class Lease:
    """One sequence on one engine, for as long as the context manager that gave it stays open.

    ``call`` is the transport: it brings a method's name and its message to a `rapid.engine.lease.LeasedSequence`, in
    this process or in another, and the result back. A call is sent when it is made, and calls are carried out in order.
    Every call raises EngineLost where the engine is gone.
    """

    def __init__(self, call: Call) -> None:
        self.call = call

    def prefill(self) -> Awaitable[PrefillResult]:
        """Reads the prompt."""
        return self.call("prefill")

    def propose(self, request: DraftRequest) -> Awaitable[Draft]:
        """A draft (`rapid.engine.propose.propose`)."""
        return self.call("propose", request)

    def drafted_ahead(self) -> Awaitable[Draft | None]:
        """What the latest `propose` drafts ahead (`rapid.engine.propose.drafted_ahead`)."""
        return self.call("drafted_ahead")

    def verify(self, request: VerifyRequest) -> Awaitable[VerifyResult]:
        """One round (`rapid.engine.verify.verify_draft`)."""
        return self.call("verify", request)


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
            RetrievalFailed: the retriever cannot tell now.
        """
        ...

    async def forget(self, tokens: list[int]) -> None:
        """Drops what the engines have cached of a text of these ``tokens``."""
        ...

    def lease(self, role: Role, request: SequenceRequest) -> AbstractAsyncContextManager[Lease]:
        """A sequence on one of the engines.

        Raises:
            Overloaded: there is no room, and the request may not wait or too many requests do.
            EngineLost: no engine answers.
        """
        ...
