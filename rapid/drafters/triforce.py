"""A hierarchy of drafters (TriForce, arXiv 2404.11912): small drafts, refined by the target over a part of its pages.

The bottom drafts a token: the drafter's engine from a window of the prompt, or a lookup where the drafter is not there
or is the target itself. The middle, the target over the pages that the prompt's last query looks for, verifies it and
adds one. When there are γ tokens, the target verifies them over all pages. Each step is exact, so q of the draft is the
middle's distribution, whatever the bottom proposed.

    bottom   "the"             → middle  "the mat"      (accepted, and the token after it)
    bottom   "on"              → middle  ". Then"       (no: the recovered token ".", and no more)
    target verifies "the mat ."
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from rapid.drafters.lookup import Lookup
from rapid.drafters.magicdec import SelfDrafter
from rapid.drafters.retrieval import RetrievalDrafter
from rapid.drafters.session import Session
from rapid.engine.messages import CacheView, DraftRequest, RefineRequest
from rapid.errors import DraftLost, EngineLost, RequestQuarantined
from rapid.speculation.draft import Draft, DraftLimits, VerifyResult, certain_draft

logger = logging.getLogger(__name__)

NUM_SINKS, WINDOW = 16, 240  # of the prompt's tokens, for the bottom
_LOOKED_UP = 3  # tokens of a lookup that the middle verifies at once; a pass over few costs hardly more than one


class HierarchyDrafter(SelfDrafter):
    """Samples drafts from q, the target's distribution over the retrieved pages, with the help of a bottom drafter."""

    label = "hierarchy"

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._bottom = None if session.backend.is_colocated else _WindowDrafter(session)
        self._lookup: Lookup

    async def start(self, *, wait: bool) -> None:
        self._lookup = await asyncio.to_thread(Lookup, self._session.request.prompt.tokens)
        if self._bottom is not None:
            await self._bottom.start(wait=wait)

    async def propose(self, limits: DraftLimits) -> Draft:
        self._proposed = True
        session = self._session
        view = CacheView("chunks", session.request.speculation.draft_cache_tokens)
        eos = session.backend.info("target").eos_token_ids
        draft, elapsed_ms, refining_ms, ended = Draft(len(session.output)), 0.0, 0.0, False
        while not ended:
            bottom = await self._from_below(draft.tokens, limits.max_tokens - len(draft.tokens) - 1)
            try:
                refined = await session.target.refine(RefineRequest(bottom, list(draft.tokens), view))
            except (EngineLost, RequestQuarantined):
                raise
            except Exception as error:
                raise DraftLost(f"the target refined nothing: {error}") from error
            elapsed_ms += bottom.elapsed_ms + refined.elapsed_ms
            refining_ms += bottom.elapsed_ms + refined.step_ms
            ended = any(draft.append(token, limits, eos) for token in refined.each())
        return replace(draft, elapsed_ms=elapsed_ms, step_ms=refining_ms / len(draft.tokens))

    async def _from_below(self, drafted: list[int], most: int) -> Draft:
        """The bottom's draft behind the output and ``drafted``, of at most ``most`` tokens; it may be empty."""
        offset = len(self._session.output) + len(drafted)
        if most > 0 and self._bottom is not None and self._bottom.offer(1) is not None:
            try:
                return await self._bottom.draft(drafted)
            except DraftLost as error:
                logger.warning("going on with lookups: %s", error.message)
                await self._bottom.lost()
        found = self._lookup.find(min(most, _LOOKED_UP), drafted) if most > 0 else None
        return certain_draft(offset, found[1] if found else [])

    def observe(self, result: VerifyResult) -> None:
        super().observe(result)
        self._lookup.extend(result.tokens)

    async def close(self) -> None:
        if self._bottom is not None:
            await self._bottom.close()


class _WindowDrafter(RetrievalDrafter):
    """The drafter's engine with the prompt's first tokens and its last ones, at neighbouring positions."""

    async def _prompt(self) -> list[int]:
        tokens = self._session.request.prompt.tokens
        return tokens if len(tokens) <= NUM_SINKS + WINDOW else tokens[:NUM_SINKS] + tokens[-WINDOW:]

    async def draft(self, drafted: list[int]) -> Draft:
        """A token behind the output and the tokens ``drafted`` in this round.

        Raises:
            DraftLost: it does not come.
        """
        assert self._lease is not None
        output = self._session.output
        known, self._knows = self._knows, len(output)
        request = DraftRequest(known, output[known:] + drafted, DraftLimits(1), round_start=len(output))
        draft = await self._answer(self._lease.propose(request))
        self._losses = 0
        return draft
