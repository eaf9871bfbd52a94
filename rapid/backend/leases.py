"""A request's two sequences, each held by a lease on some engine, and leased anew where the engine is lost.

The request has every token that was emitted, so nothing is lost with an engine: another one reads the prompt and the
output so far, and goes on from there. Positions are counted in the output, so no token can be written twice either.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TypeVar

from rapid.backend.protocol import Backend, DraftHandle, Lease, Role
from rapid.engine.sequence import SequenceRequest
from rapid.errors import DraftLost, EngineLost, RapidError
from rapid.events import Statistics
from rapid.speculation.draft import Draft, DraftLimits, VerifyResult

T = TypeVar("T")
logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0  # between two tries to lease


class TargetLease:
    """The sequence that verifies. ``output`` is the request's own list, which grows with every round."""

    def __init__(
        self, backend: Backend, role: Role, opening: SequenceRequest, output: list[int], stats: Statistics
    ) -> None:
        self._backend, self._role, self._stats = backend, role, stats
        self._opening, self._output = opening, output
        self._stack = AsyncExitStack()
        self._lease: Lease | None = None

    async def open(self) -> None:
        """Waits for a place, and reads the prompt."""
        await self._try_until_open(lambda error: isinstance(error, EngineLost))

    async def _open(self) -> None:
        opening = self._opening.after(self._output)
        asked = time.monotonic()
        lease = await self._stack.enter_async_context(self._backend.lease(self._role, opening))
        self._stats.timings_ms["queueing"] += (time.monotonic() - asked) * 1e3
        prefilled = await lease.prefill()
        self._lease = lease
        if not opening.written:
            self._stats.cached_tokens = prefilled.cached_tokens
        self._stats.timings_ms["target_prefill"] += prefilled.elapsed_ms

    async def verify(self, draft: DraftHandle | Draft, rule: str, transfer_strength: float) -> VerifyResult:
        """One round, on another engine where this one is lost.

        Raises:
            DraftLost: the draft never came; the sequence is as it was.
            EngineLost: no other engine was found for as long as the backend has patience.
        """
        while True:
            try:
                if self._lease is None:
                    await self._resume()
                assert self._lease is not None
                return await self._lease.verify(draft, rule, transfer_strength)
            except EngineLost as error:
                if self._lease is None:
                    raise
                logger.warning("the %s is lost after %d tokens: %s", self._role, len(self._output), error.message)
                self._lease = None

    async def close(self) -> None:
        await self._stack.aclose()

    async def _resume(self) -> None:
        started = time.monotonic()
        self._stats.resumed += 1
        await self._stack.aclose()
        await self._try_until_open(_may_pass)  # whoever has begun to answer waits for room, too
        self._stats.timings_ms["resuming"] += (time.monotonic() - started) * 1e3

    async def _try_until_open(self, try_again: Callable[[RapidError], bool]) -> None:
        started, pause = time.monotonic(), _FIRST_PAUSE_S
        while True:
            try:
                return await self._open()
            except RapidError as error:
                await self._stack.aclose()
                if not try_again(error) or time.monotonic() - started + pause > self._backend.resume_timeout_s:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


class DrafterLease:
    """The sequence that drafts, leased in the background: at once, and again for as long as there is none.

    ``read`` gives what it opens with, as of the request's beginning, or None where there is nothing to draft from.
    """

    def __init__(
        self,
        backend: Backend,
        read: Callable[[], Awaitable[SequenceRequest | None]],
        output: list[int],
        stats: Statistics,
    ) -> None:
        self._backend, self._read, self._output, self._stats = backend, read, output, stats
        self._stack = AsyncExitStack()
        self._lease: Lease | None = None
        self._eos = backend.info("drafter").eos_token_ids
        self._ahead: asyncio.Future[Draft | None] | None = None
        self._knows = 0  # how much of the output the drafter has seen
        self._opening: SequenceRequest | None = None  # once it is read
        self._tried = asyncio.Event()
        self._trying = asyncio.create_task(self._open())

    @property
    def is_ready(self) -> bool:
        return self._lease is not None

    async def first_try(self) -> None:
        """Until it is clear whether there is a drafter now."""
        await self._tried.wait()

    def propose(self, limits: DraftLimits, draft_top_k: int) -> DraftHandle | Draft:
        """The next draft: at once where it was drafted ahead and is here already, else once the drafter sends it."""
        assert self._lease is not None
        sent = self._lease.propose(self._knows, self._output[self._knows :], limits, draft_top_k)
        draft = self._drafted_ahead(limits)
        if draft is not None:
            _unwatched(sent)  # it is the same
        self._knows, self._ahead = len(self._output), None
        if limits.ahead:
            self._ahead = _unwatched(self._lease.ahead())
        return draft or sent

    def _drafted_ahead(self, limits: DraftLimits) -> Draft | None:
        """The draft that was made in case the output would go on as it did; None where it did not, or is not here."""
        if self._ahead is None or not self._ahead.done() or self._ahead.cancelled() or self._ahead.exception():
            return None
        drafted = self._ahead.result()
        if drafted is None:
            return None
        written = self._output[drafted.offset :]
        guessed = len(drafted.tokens) - drafted.num_ahead < len(written) and drafted.tokens[: len(written)] == written
        draft, ended = drafted.after(len(self._output)).within(limits, self._eos)
        return replace(draft, num_ahead=len(draft.tokens)) if guessed and ended else None

    async def lost(self) -> None:
        """Its draft did not come: another lease, when there is one, goes on from the output so far."""
        self._stats.drafters_lost += 1
        self._lease = self._ahead = None
        await self._stack.aclose()
        self._stats.fallback = DraftLost("").code
        if self._backend.resume_timeout_s:
            self._trying = asyncio.create_task(self._open(_FIRST_PAUSE_S * 2**self._stats.drafters_lost))

    async def close(self) -> None:
        self._trying.cancel()
        await asyncio.wait([self._trying])
        await self._stack.aclose()

    async def _open(self, pause: float = 0.0) -> None:
        while True:
            pause = min(pause, _LONGEST_PAUSE_S)
            await asyncio.sleep(pause)
            try:
                self._opening = self._opening or await self._read()
                if self._opening is not None:
                    await self._open_on(self._opening)
                    self._stats.fallback = None
                return
            except Exception as error:  # no failure of the drafter's is one of the request
                logger.warning("going on without a drafter: %s", error)
                self._stats.fallback = error.code if isinstance(error, RapidError) else "drafter_failed"
                await self._stack.aclose()
                if not self._backend.resume_timeout_s or not _may_pass(error):
                    return
            finally:
                self._tried.set()
            pause = max(_FIRST_PAUSE_S, 2 * pause)

    async def _open_on(self, opening: SequenceRequest) -> None:
        self._stats.draft_prompt_tokens = len(opening.prompt)
        # It never waits for room: requests that hold one engine and wait for the other could wait for ever.
        opening = replace(opening.after(self._output), may_wait=False)
        lease = await self._stack.enter_async_context(self._backend.lease("drafter", opening))
        self._stats.timings_ms["draft_prefill"] += (await lease.prefill()).elapsed_ms
        self._knows, self._lease = opening.written, lease


def _unwatched(sent: Awaitable[T]) -> asyncio.Future[T]:
    """``sent`` as a future of which nobody may ever ask what became of it, as asyncio would complain of a failure."""
    future = asyncio.ensure_future(sent)
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


def _may_pass(error: Exception) -> bool:
    """Whether the same may succeed later: an engine is lost or full, and nothing is wrong with the request."""
    return isinstance(error, RapidError) and error.status >= 429
