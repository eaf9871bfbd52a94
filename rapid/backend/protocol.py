"""The models and the retriever, as the decode loop sees them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, Protocol

from rapid.engine.messages import DraftRequest, EngineStats, PrefillResult, SequenceRequest, VerifyRequest
from rapid.models.info import ModelInfo
from rapid.speculation.draft import Draft, VerifyResult
from rapid.speculation.learned import History
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
    """A retriever's answer: the retrieved chunks, in document order, and token counts."""

    @property
    def chunks(self) -> Sequence[RetrievedChunk]: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def retrieved_tokens(self) -> int: ...


class Lease:
    """One sequence on one engine, as long as the context manager that gave the lease is open.

    ``call`` is the transport: it sends a method's name and its message to a `rapid.engine.lease.LeasedSequence`, in
    this process or in another, and returns the result. Calls are sent at once, and the engine starts them in order.
    Every call raises EngineLost if the engine is gone.
    """

    def __init__(self, call: Call) -> None:
        self.call = call

    def prefill(self) -> Awaitable[PrefillResult]:
        """Prefills the prompt."""
        return self.call("prefill")

    def propose(self, request: DraftRequest) -> Awaitable[Draft]:
        """Asks for a draft (`rapid.engine.propose.propose`)."""
        return self.call("propose", request)

    def drafted_ahead(self) -> Awaitable[Draft | None]:
        """The tokens that the latest `propose` drafts ahead (`rapid.engine.propose.drafted_ahead`)."""
        return self.call("drafted_ahead")

    def verify(self, request: VerifyRequest) -> Awaitable[VerifyResult]:
        """Verifies one round (`rapid.engine.verify.verify_draft`)."""
        return self.call("verify", request)


class Backend(Protocol):
    """Gives `generate` sequences on engines, and retrieved passages.

    ``history`` is what requests learned of their rounds, for later ones. ``resume_timeout_s`` is how long a request
    looks for another engine after a loss; 0 if there is no other engine. With ``overlap`` drafters draft ahead while
    the target verifies.
    """

    history: History
    resume_timeout_s: float
    overlap: bool

    def info(self, role: Role) -> ModelInfo: ...
    async def stats(self) -> dict[Role, EngineStats]:
        """The statistics of every engine that answers."""
        ...

    async def retrieve(self, contents: list[str], query: str, options: Any) -> Retrieval:
        """The chunks of ``contents`` that are relevant to ``query``.

        Raises:
            RetrievalFailed: the retriever or its store is gone or failed.
        """
        ...

    async def forget(self, tokens: list[int], salt: str = "") -> None:
        """Makes the engines forget what they cached of a text with these ``tokens`` for sequences with ``salt``."""
        ...

    def lease(self, role: Role, request: SequenceRequest) -> AbstractAsyncContextManager[Lease]:
        """Leases a sequence on one of the engines.

        Raises:
            Overloaded: there is no room, and the request may not wait, or too many requests wait already.
            EngineLost: no engine answers.
        """
        ...
