"""A drafter model that reads the passages retrieved from the context, on an engine of its own (paper §3.2).

The drafter leases its sequence in the background, and leases a new one when it is lost. The answer never waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import NamedTuple, TypeVar

from rapid.backend.leases import FIRST_PAUSE_S, LONGEST_PAUSE_S, may_pass
from rapid.backend.protocol import Lease, Retrieval
from rapid.backend.quarantine import MAX_RESUMPTIONS
from rapid.drafters.sampling import SamplingDrafter
from rapid.drafters.sentences import SentenceWatch
from rapid.drafters.session import Session
from rapid.engine.messages import DraftRequest, SequenceRequest
from rapid.errors import DraftLost, EngineLost, RapidError
from rapid.models.draft_vocabulary import by_frequency
from rapid.speculation.controller import Offer
from rapid.speculation.draft import Draft, DraftLimits, VerifyResult

T = TypeVar("T")
logger = logging.getLogger(__name__)

# The drafter's random numbers must differ from the target's: acceptance has to be independent of the draft tokens.
_DRAFTER_SEED = 0x5DEECE66D


class RetrievalDrafter(SamplingDrafter):
    """Samples drafts from q, the drafter's distribution given the passages."""

    label = "model"

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._backend = session.backend
        self._stack = AsyncExitStack()
        self._lease: Lease | None = None
        self._eos = session.backend.info("drafter").eos_token_ids
        self._ahead: asyncio.Future[Draft | None] | None = None
        self._knows = 0  # how many output tokens the drafter has
        self._losses = 0  # drafters that were lost without a draft in between
        self._request: SequenceRequest | None = None  # for its sequence, once the passages are known
        # A transfer everywhere writes the same text whatever its rounds are, so no round's end may change q.
        how = session.request.speculation
        refreshes = how.refresh == "auto" and not how.transfers_everywhere
        self._watch = SentenceWatch(session.request.prompt.tokenizer) if refreshes else None
        self._refreshing: asyncio.Task[_Reading | None] | None = None
        self._tried = asyncio.Event()
        self._trying = asyncio.create_task(self._open())

    async def start(self, *, wait: bool) -> None:
        if wait:
            await self._tried.wait()

    def offer(self, room: int) -> Offer | None:
        return None if self._lease is None else super().offer(room)

    async def propose(self, limits: DraftLimits) -> Draft:
        """The draft that was made ahead, if it is here and still fits; else the draft that the drafter sends now."""
        assert self._lease is not None
        self._proposed = True
        session, output = self._session, self._session.output
        if self._refreshing is not None and (self._refreshing.done() or not session.by_the_clock):
            await self._take_over(await self._refreshing)
        # The clock decides how far the drafter drafts ahead, and so which random numbers each token gets.
        limits = replace(limits, ahead=self._backend.overlap and session.by_the_clock)
        sent = self._lease.propose(DraftRequest(self._knows, output[self._knows :], limits))
        draft = self._drafted_ahead(limits)
        if draft is not None:
            _unwatched(sent)  # the drafter sends the same draft
        self._knows, self._ahead = len(output), None
        if limits.ahead:
            self._ahead = _unwatched(self._lease.drafted_ahead())
        draft = draft or await self._answer(sent)
        self._losses = 0
        return draft

    async def _answer(self, sent: Awaitable[Draft]) -> Draft:
        try:
            return await sent
        except Exception as error:
            self._losses += 1
            raise DraftLost(f"the drafter failed: {error}") from error

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
        # The guess was written, too. A guess of the likeliest is no draw, so it may be a draft token itself.
        request = self._session.request
        draws = not request.speculation.drafts_likeliest(request.sampling)
        least = len(drafted.tokens) - drafted.num_ahead + draws
        guessed = least <= len(written) and drafted.tokens[: len(written)] == written
        draft, ended = drafted.after(len(output)).within(limits, self._eos)
        return replace(draft, num_ahead=len(draft.tokens)) if guessed and ended else None

    def observe(self, result: VerifyResult) -> None:
        super().observe(result)
        sentence = self._watch and self._watch.observe(result)
        if sentence and self._lease is not None and self._refreshing is None:
            self._refreshing = asyncio.create_task(self._read_anew(sentence))

    async def lost(self) -> None:
        """Leases another sequence, which continues from the output so far."""
        statistics = self._session.statistics
        statistics.drafters_lost += 1
        self._lease = self._ahead = None
        self._proposed = False
        await self._stop_refreshing()
        await self._stack.aclose()
        statistics.fallback = DraftLost("").code
        if self._backend.resume_timeout_s:
            self._trying = asyncio.create_task(self._open(FIRST_PAUSE_S * 2**statistics.drafters_lost))

    async def close(self) -> None:
        self._trying.cancel()
        await asyncio.wait([self._trying])
        await self._stop_refreshing()
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
                    statistics.fallback = "nothing_above_threshold" if self._session.unsure else None
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

    async def _prompt(self) -> list[int] | None:
        """What the drafter reads; None, with the reason in the statistics, if there is nothing.

        Any q will do for drafts that do not move the output, so the best passages are read whatever their scores are.
        In a transfer everywhere q always has a say.
        """
        session = self._session
        return await session.retrieved_prompt(at_any_score=not session.request.speculation.transfers_everywhere)

    async def _read(self) -> SequenceRequest | None:
        """The request for the drafter's sequence; None, with the reason in the statistics, if it cannot read."""
        prompt = await self._prompt()
        if prompt is None:
            return None
        request = self._request_for(prompt)
        if not self._fits(request):
            self._session.statistics.fallback = "drafter_window_exceeded"
            return None
        return request

    def _request_for(self, prompt: list[int]) -> SequenceRequest:
        session = self._session
        sampling = session.request.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed ^ _DRAFTER_SEED)
        return SequenceRequest(
            prompt,
            session.max_new_tokens,
            sampling,
            session.request.speculation,
            logits=session.logits,
            known=by_frequency(session.request.prompt.tokens),
            salt=session.request.salt,
        )

    def _fits(self, request: SequenceRequest) -> bool:
        return request.capacity - 1 <= self._backend.info("drafter").window  # the last token is never read

    async def _open_with(self, request: SequenceRequest) -> None:
        self._session.statistics.draft_prompt_tokens = len(request.prompt)
        self._lease, self._knows = await self._leased(request, self._stack)

    async def _leased(self, request: SequenceRequest, stack: AsyncExitStack) -> tuple[Lease, int]:
        """A lease on ``stack`` that has read the prompt and the output so far, and how many output tokens it has."""
        # The drafter never waits for room: two requests that each hold one engine's room could block each other.
        request = replace(request.after(self._session.output), may_wait=False)
        lease = await stack.enter_async_context(self._backend.lease("drafter", request))
        try:
            self._session.statistics.timings_ms["draft_prefill"] += (await lease.prefill()).elapsed_ms
        except EngineLost:
            self._losses += 1
            raise
        return lease, request.written

    async def _read_anew(self, sentence: str) -> _Reading | None:
        """A sequence that has read the passages for ``sentence``; None if they are the same ones, or cannot be read."""
        stack = AsyncExitStack()
        try:
            retrieval = await self._session.retrieve(sentence)
            request = self._request_for(self._session.request.prompt.shortened(retrieval.chunks))
            if (
                not (retrieval.chunks and retrieval.reaches_threshold)
                or request == self._request
                or not self._fits(request)
            ):
                return None
            return _Reading(request, retrieval, stack, *await self._leased(request, stack))
        except Exception as error:  # the passages that are there go on to serve
            logger.warning("going on with the same passages: %s", error)
            await stack.aclose()
            return None
        except BaseException:
            await stack.aclose()
            raise

    async def _take_over(self, reading: _Reading | None) -> None:
        """Drafts from what was read anew, from now on."""
        self._refreshing = None
        if reading is None:
            return
        await self._stack.aclose()
        self._request, self._stack = reading.request, reading.stack
        self._lease, self._knows, self._ahead = reading.lease, reading.knows, None
        statistics = self._session.statistics
        statistics.draft_prompt_tokens = len(reading.request.prompt)
        statistics.refreshed += 1
        self._session.rely_on(reading.retrieval)

    async def _stop_refreshing(self) -> None:
        """Ends the reading that is under way, and frees its sequence."""
        refreshing, self._refreshing = self._refreshing, None
        if refreshing is not None:
            refreshing.cancel()
            await asyncio.wait([refreshing])
            if not refreshing.cancelled() and (reading := refreshing.result()) is not None:
                await reading.stack.aclose()


class _Reading(NamedTuple):
    """A sequence on ``stack`` that has read other passages, and the first ``knows`` tokens of the output."""

    request: SequenceRequest
    retrieval: Retrieval
    stack: AsyncExitStack
    lease: Lease
    knows: int


def _unwatched(sent: Awaitable[T]) -> asyncio.Future[T]:
    """``sent`` as a future whose exception is retrieved here; else asyncio would log that it was not."""
    future = asyncio.ensure_future(sent)
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future
