"""The target's sequence, leased on an engine, and leased again when that engine is lost.

The request holds every emitted token. So when an engine is lost, another engine reads the prompt and the output so far,
and continues from there. Positions count output tokens, so no token can be written twice.

It may be the request that ends the engines. So after two resumptions without a token in between it fails, and is
refused for some minutes (`rapid.backend.quarantine`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import TypeVar

from rapid.backend.protocol import Backend, Lease, Role
from rapid.backend.quarantine import MAX_RESUMPTIONS
from rapid.engine.messages import (
    DraftRequest,
    RefineRequest,
    ScoreRequest,
    ScoreResult,
    SelfDraftRequest,
    SequenceRequest,
    VerifyRequest,
)
from rapid.errors import EngineLost, RapidError, RequestQuarantined
from rapid.events import Statistics
from rapid.speculation.draft import Draft, VerifyResult

T = TypeVar("T")
logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0  # seconds between two tries to lease
LONGEST_APART_S = 2.0


class TargetLease:
    """The sequence that verifies. ``output`` is the request's own list, which grows with every round.

    ``scored`` are the tokens behind the prompt that `score` is about; there are none where the sequence writes.

    Every call raises EngineLost if the engine is lost and no other was found within the backend's ``resume_timeout_s``.
    """

    def __init__(
        self,
        backend: Backend,
        role: Role,
        request: SequenceRequest,
        output: list[int],
        stats: Statistics,
        scored: Sequence[int] = (),
    ) -> None:
        self._backend, self._role, self._stats = backend, role, stats
        self._request, self._output, self._scored = request, output, scored
        self._stack = AsyncExitStack()
        self._lease: Lease | None = None
        self._losses, self._lost_at = 0, 0  # how often an engine was lost after that many tokens

    async def open(self) -> None:
        """Waits for room on an engine, and prefills the prompt.

        Raises:
            RequestQuarantined: engines were lost with this request.
        """
        self._backend.quarantine.check(self._request, self._scored)
        await self._try_until_open(lambda error: isinstance(error, EngineLost))

    async def _open(self) -> None:
        request = self._request.after(self._output)
        asked = time.monotonic()
        lease = await self._stack.enter_async_context(self._backend.lease(self._role, request))
        self._stats.timings_ms["queueing"] += (time.monotonic() - asked) * 1e3
        try:
            prefilled = await lease.prefill()
        except EngineLost as error:
            self._lost(error)
            raise
        self._lease = lease
        if not request.written:
            self._stats.cached_tokens = prefilled.cached_tokens
        timing = "resuming_prefill" if self._stats.resumed else "target_prefill"
        self._stats.timings_ms[timing] += prefilled.elapsed_ms

    async def verify(self, request: VerifyRequest) -> VerifyResult:
        """Verifies one round."""
        return await self._call(lambda lease: lease.verify(request))

    async def draft_over_view(self, request: SelfDraftRequest) -> Draft:
        """A draft of the target's own, over some of its pages."""
        return await self._call(lambda lease: lease.draft_over_view(request))

    async def refine(self, request: RefineRequest) -> Draft:
        """Another's draft, refined over some of the target's pages."""
        return await self._call(lambda lease: lease.refine(request))

    async def propose(self, request: DraftRequest) -> Draft:
        """A draft by the target itself, as a drafter would."""
        return await self._call(lambda lease: lease.propose(request))

    async def score(self, num_top: int = 0) -> ScoreResult:
        """How probable ``scored`` is, and the ``num_top`` likeliest tokens in each place."""
        request = ScoreRequest(list(self._scored), num_top)
        return await self._call(lambda lease: lease.score(request))

    async def close(self) -> None:
        await self._stack.aclose()

    async def _call(self, ask: Callable[[Lease], Awaitable[T]]) -> T:
        """The answer to ``ask``. If the engine is lost, another engine continues, and is asked the same.

        Raises:
            EngineLost: no other engine was found within the backend's ``resume_timeout_s``.
            RequestQuarantined: a third engine was lost without a token in between.
        """
        while True:
            try:
                if self._lease is None:
                    await self._resume()
                assert self._lease is not None
                return await ask(self._lease)
            except EngineLost as error:
                if self._lease is None:
                    raise
                self._lease = None
                self._lost(error)

    def _lost(self, error: EngineLost) -> None:
        """An engine that had the sequence is lost."""
        logger.warning("the %s is lost after %d tokens: %s", self._role, len(self._output), error.message)
        self._losses = self._losses + 1 if len(self._output) == self._lost_at else 1
        self._lost_at = len(self._output)
        if self._losses > MAX_RESUMPTIONS:
            raise self._backend.quarantine.add(self._request, self._scored) from error

    async def _resume(self) -> None:
        started = time.monotonic()
        self._stats.resumed += 1
        await self._stack.aclose()
        if self._losses > 1:
            # One of several requests may end the engines; apart in time, it no longer takes the others with it.
            await asyncio.sleep(random.uniform(0, LONGEST_APART_S))
        await self._try_until_open(may_pass)  # a request that has begun to answer also waits for room
        self._stats.timings_ms["resuming"] += (time.monotonic() - started) * 1e3

    async def _try_until_open(self, try_again: Callable[[RapidError], bool]) -> None:
        started, pause = time.monotonic(), FIRST_PAUSE_S
        while True:
            try:
                return await self._open()
            except RapidError as error:
                await self._stack.aclose()
                if (
                    isinstance(error, RequestQuarantined)
                    or not try_again(error)
                    or time.monotonic() - started + pause > self._backend.resume_timeout_s
                ):
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)


def may_pass(error: Exception) -> bool:
    """Whether a later try may succeed: an engine is lost or full, and the request itself is valid."""
    return isinstance(error, RapidError) and error.status >= 429 and not isinstance(error, RequestQuarantined)
