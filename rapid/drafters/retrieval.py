"""A drafter model that reads the passages retrieved from the context, on an engine of its own (paper §3.2).

The drafter leases its sequence in the background, and leases a new one when it is lost. The answer never waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TypeVar

from rapid.backend.leases import FIRST_PAUSE_S, LONGEST_PAUSE_S, may_pass
from rapid.backend.protocol import Lease
from rapid.backend.quarantine import MAX_RESUMPTIONS
from rapid.drafters.interface import Drafter
from rapid.drafters.session import Session
from rapid.engine.messages import DraftRequest, SequenceRequest
from rapid.errors import DraftLost, EngineLost, RapidError
from rapid.models.draft_vocabulary import by_frequency
from rapid.speculation.controller import Offer
from rapid.speculation.draft import CONFIDENCES, Draft, DraftLimits, VerifyResult
from rapid.speculation.learned import Acceptance

T = TypeVar("T")
logger = logging.getLogger(__name__)

# The drafter's random numbers must differ from the target's: acceptance has to be independent of the draft tokens.
_DRAFTER_SEED = 0x5DEECE66D
CONFIDENCE_PRIOR = (0.45, 0.5, 0.55, 0.6, 0.7, 0.78, 0.85, 0.9, 0.96)  # by class of CONFIDENCES


class RetrievalDrafter(Drafter):
    """Samples drafts from q, the drafter's distribution given the passages."""

    label = "model"
    sampled = True

    def __init__(self, session: Session) -> None:
        self._session, self._backend = session, session.backend
        self._acceptance = session.learned.acceptance_of(self.label, lambda: Acceptance(CONFIDENCES, CONFIDENCE_PRIOR))
        self._stack = AsyncExitStack()
        self._lease: Lease | None = None
        self._eos = session.backend.info("drafter").eos_token_ids
        self._ahead: asyncio.Future[Draft | None] | None = None
        self._proposed = False
        self._knows = 0  # how many output tokens the drafter has
        self._losses = 0  # drafters that were lost without a draft in between
        self._request: SequenceRequest | None = None  # for its sequence, once the passages are known
        self._tried = asyncio.Event()
        self._trying = asyncio.create_task(self._open())

    async def start(self, *, wait: bool) -> None:
        if wait:
            await self._tried.wait()

    def offer(self, room: int) -> Offer | None:
        if self._lease is None:
            return None
        acceptance = self._acceptance
        return Offer(self.label, room, by_confidence=acceptance.table(), mean=acceptance.mean())

    async def propose(self, limits: DraftLimits) -> Draft:
        """The draft that was made ahead, if it is here and still fits; else the draft that the drafter sends now."""
        assert self._lease is not None
        self._proposed = True
        session, output = self._session, self._session.output
        # The clock decides how far the drafter drafts ahead, and so which random numbers each token gets.
        limits = replace(limits, ahead=self._backend.overlap and session.by_the_clock)
        sent = self._lease.propose(DraftRequest(self._knows, output[self._knows :], limits))
        draft = self._drafted_ahead(limits)
        if draft is not None:
            _unwatched(sent)  # the drafter sends the same draft
        self._knows, self._ahead = len(output), None
        if limits.ahead:
            self._ahead = _unwatched(self._lease.drafted_ahead())
        try:
            draft = draft or await sent
        except Exception as error:
            self._losses += 1
            raise DraftLost(f"the drafter failed: {error}") from error
        self._losses = 0
        return draft

    def _drafted_ahead(self, limits: DraftLimits) -> Draft | None:
        """The draft that was made ahead, on the guess that all draft tokens are accepted.

        Returns None if the output differs from the guess, or the draft is not here.
        """
        if self._ahead is None or not self._ahead.done() or self._ahead.cancelled() or self._ahead.exception():
            return None
        drafted = self._ahead.result()
        if drafted is None:
            return None
        output = self._session.output
        written = output[drafted.offset :]
        guessed = len(drafted.tokens) - drafted.num_ahead < len(written) and drafted.tokens[: len(written)] == written
        draft, ended = drafted.after(len(output)).within(limits, self._eos)
        return replace(draft, num_ahead=len(draft.tokens)) if guessed and ended else None

    def observe(self, result: VerifyResult) -> None:
        if self._proposed:
            for i, confidence in enumerate(result.confidences[: result.num_accepted + 1]):
                self._acceptance.observe(confidence, i < result.num_accepted)
        self._proposed = False

    async def lost(self) -> None:
        """Leases another sequence, which continues from the output so far."""
        statistics = self._session.statistics
        statistics.drafters_lost += 1
        self._lease = self._ahead = None
        self._proposed = False
        await self._stack.aclose()
        statistics.fallback = DraftLost("").code
        if self._backend.resume_timeout_s:
            self._trying = asyncio.create_task(self._open(FIRST_PAUSE_S * 2**statistics.drafters_lost))

    async def close(self) -> None:
        self._trying.cancel()
        await asyncio.wait([self._trying])
        await self._stack.aclose()

    async def _open(self, pause: float = 0.0) -> None:
        statistics = self._session.statistics
        while self._losses <= MAX_RESUMPTIONS:  # it may be this request that ends them
            pause = min(pause, LONGEST_PAUSE_S)
            await asyncio.sleep(pause)
            try:
                self._request = self._request or await self._read()
                if self._request is not None:
                    await self._open_with(self._request)
                    statistics.fallback = None
                return
            except Exception as error:  # a failure of the drafter must not fail the request
                logger.warning("going on without a drafter: %s", error)
                statistics.fallback = error.code if isinstance(error, RapidError) else "drafter_failed"
                await self._stack.aclose()
                if not self._backend.resume_timeout_s or not may_pass(error):
                    return
            finally:
                self._tried.set()
            pause = max(FIRST_PAUSE_S, 2 * pause)

    async def _read(self) -> SequenceRequest | None:
        """The request for the drafter's sequence; None, with the reason in the statistics, if it cannot read."""
        session = self._session
        prompt = await session.retrieved_prompt()
        if prompt is None:
            return None
        sampling = session.request.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed ^ _DRAFTER_SEED)
        request = SequenceRequest(
            prompt,
            session.max_new_tokens,
            sampling,
            session.request.speculation,
            logits=session.logits,
            known=by_frequency(session.request.prompt.tokens),
            salt=session.request.salt,
        )
        if request.capacity - 1 > self._backend.info("drafter").window:  # the last token is never read
            session.statistics.fallback = "drafter_window_exceeded"
            return None
        return request

    async def _open_with(self, request: SequenceRequest) -> None:
        statistics = self._session.statistics
        statistics.draft_prompt_tokens = len(request.prompt)
        # The drafter never waits for room: two requests that each hold one engine's room could block each other.
        request = replace(request.after(self._session.output), may_wait=False)
        lease = await self._stack.enter_async_context(self._backend.lease("drafter", request))
        try:
            statistics.timings_ms["draft_prefill"] += (await lease.prefill()).elapsed_ms
        except EngineLost:
            self._losses += 1
            raise
        self._knows, self._lease = request.written, lease


def _unwatched(sent: Awaitable[T]) -> asyncio.Future[T]:
    """``sent`` as a future whose exception is retrieved here; else asyncio would log that it was not."""
    future = asyncio.ensure_future(sent)
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future
