"""The models and the retriever, as the decode loop sees them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rapid.backend.quarantine import Quarantine
from rapid.backend.waiting import ROUND_LIMIT_S, TARGET_PATIENCE_S, prefill_limit_s, while_it_goes_on
from rapid.engine.messages import (
    DraftRequest,
    EngineStats,
    PrefillResult,
    Pulse,
    RefineRequest,
    ScoreRequest,
    ScoreResult,
    SelfDraftRequest,
    SequenceRequest,
    VerifyRequest,
)
from rapid.errors import EngineHung
from rapid.models.info import ModelInfo
from rapid.speculation.draft import Draft, VerifyResult
from rapid.speculation.learned import History
from rapid.text.prompts import RetrievedText

Role = Literal["target", "drafter"]
Call = Callable[..., Awaitable[Any]]  # (method, message) → result


class RetrievedChunk(RetrievedText, Protocol):
    """A chunk of the context: ``position`` counts all chunks in document order, ``score`` says how near it is.

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
    """A retriever's answer: the retrieved chunks, in document order, and token counts.

    Without ``reaches_threshold`` no chunk is similar enough to the query, and the chunks are the best there are.
    ``confidence``, 0 to 1, is how probable it is that they hold what the query needs.
    """

    @property
    def chunks(self) -> Sequence[RetrievedChunk]: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def retrieved_tokens(self) -> int: ...
    @property
    def reaches_threshold(self) -> bool: ...
    @property
    def confidence(self) -> float: ...


class Vitals(NamedTuple):
    """The statistics of the ``engines`` that answer, and what is wrong (``problems``) with which part, in words."""

    engines: dict[Role, list[EngineStats]]
    problems: dict[str, str]

    def serves(self, role: Role) -> bool:
        """Whether at least one engine in this role is well."""
        return any(not engine.pulse.is_stuck(TARGET_PATIENCE_S) for engine in self.engines.get(role, ()))


@dataclass(frozen=True)
class Lease:
    """One sequence on one engine, as long as the context manager that gave the lease is open.

    ``call`` is the transport: it sends a method's name and its message to a `rapid.engine.lease.LeasedSequence`, in
    this process or in another, and returns the result. Calls are sent at once, and the engine starts them in order.
    Every call raises EngineLost if the engine is gone, and EngineHung if it does not go on (`rapid.backend.waiting`).

    ``prompt_tokens`` are to be prefilled, at most. ``patience_s`` is for a pulse, and at least for a pass. ``hung`` and
    ``answered`` are called with what comes of the calls, so that other requests need not find out for themselves.
    """

    call: Call
    prompt_tokens: int = 0
    patience_s: float = TARGET_PATIENCE_S
    hung: Callable[[EngineHung], None] = lambda _: None
    answered: Callable[[], None] = lambda: None

    def over(self, call: Call) -> Lease:
        """The same lease over another transport, which wraps this one's."""
        return replace(self, call=call)

    def prefill(self) -> Awaitable[PrefillResult]:
        """Prefills the prompt."""
        return self._watched(self.call("prefill"), prefill_limit_s(self.prompt_tokens))

    def propose(self, request: DraftRequest) -> Awaitable[Draft]:
        """Asks for a draft (`rapid.engine.propose.propose`)."""
        return self._watched(self.call("propose", request), ROUND_LIMIT_S)

    def drafted_ahead(self) -> Awaitable[Draft | None]:
        """The tokens that the latest `propose` drafts ahead (`rapid.engine.propose.drafted_ahead`)."""
        return self.call("drafted_ahead")

    def draft_over_view(self, request: SelfDraftRequest) -> Awaitable[Draft]:
        """Asks for a draft over some of the sequence's own pages (`rapid.engine.self_draft.draft_over_view`)."""
        return self._watched(self.call("draft_over_view", request), ROUND_LIMIT_S)

    def refine(self, request: RefineRequest) -> Awaitable[Draft]:
        """Asks to refine another's draft over some of the pages (`rapid.engine.self_draft.refine`)."""
        return self._watched(self.call("refine", request), ROUND_LIMIT_S)

    def verify(self, request: VerifyRequest) -> Awaitable[VerifyResult]:
        """Verifies one round (`rapid.engine.verify.verify_draft`)."""
        return self._watched(self.call("verify", request), ROUND_LIMIT_S)

    def score(self, request: ScoreRequest) -> Awaitable[ScoreResult]:
        """How probable given tokens are (`rapid.engine.score.score`)."""
        return self._watched(self.call("score", request), prefill_limit_s(len(request.tokens)))

    async def pulse(self) -> Pulse:
        """How long the engine's current pass has been running; answered also while the pass hangs."""
        pulse: Pulse = await self.call("pulse")
        return pulse

    async def _watched(self, sent: Awaitable[Any], limit_s: float) -> Any:
        try:
            answer = await while_it_goes_on(sent, self.pulse, patience_s=self.patience_s, limit_s=limit_s)
        except EngineHung as error:
            self.hung(error)
            raise
        self.answered()
        return answer


class Backend(Protocol):
    """Gives `generate` sequences on engines, and retrieved passages.

    ``history`` is what requests learned of their rounds, for later ones. ``quarantine`` knows the requests that no
    engine may get. ``resume_timeout_s`` is how long a request looks for another engine after a loss; 0 if there is no
    other engine. With ``overlap`` drafters draft ahead while the target verifies. ``is_colocated`` says that there is
    no engine for drafts but the target's.
    """

    history: History
    quarantine: Quarantine
    resume_timeout_s: float
    overlap: bool
    is_colocated: bool

    def info(self, role: Role) -> ModelInfo: ...
    async def vitals(self) -> Vitals:
        """What every part says of itself, within a few seconds."""
        ...

    async def retrieve(self, contents: list[str], query: str, options: Any) -> Retrieval:
        """The chunks of ``contents`` that are relevant to ``query``.

        Raises:
            RetrievalFailed: the retriever or its store is gone or failed.
        """
        ...

    async def embed(self, texts: list[str], salt: str = "") -> NDArray[np.float32]:
        """A unit vector for each of ``texts``: [len(texts), dimension]. What is cached is found with the same ``salt``.

        Raises:
            RetrievalFailed: the retriever is gone or failed.
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
