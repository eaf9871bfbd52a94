"""The target drafts for itself, over a small part of its own keys and values (MagicDec, arXiv 2408.11049).

The draft's passes read a view on the target's pages: no second copy of weights or keys, and no drafter's engine. The
view has the first page (the attention sinks) and either a window that slides (``draft_cache`` window) or the pages that
the end of the prompt attends to most, beside the latest (snap).
"""

from __future__ import annotations

from rapid.drafters.sampling import SamplingDrafter
from rapid.engine.messages import CacheView, SelfDraftRequest
from rapid.errors import DraftLost, EngineLost, RequestQuarantined
from rapid.speculation.controller import Offer
from rapid.speculation.draft import Draft, DraftLimits


class SelfDrafter(SamplingDrafter):
    """Samples drafts from q, the target's own distribution given the tokens of the view."""

    label = "self"
    _is_lost = False

    def offer(self, room: int) -> Offer | None:
        return None if self._is_lost else super().offer(room)

    async def propose(self, limits: DraftLimits) -> Draft:
        self._proposed = True
        session = self._session
        speculation = session.request.speculation
        view = CacheView(speculation.draft_cache, speculation.draft_cache_tokens)
        try:
            return await session.target.draft_over_view(SelfDraftRequest(len(session.output), limits, view))
        except (EngineLost, RequestQuarantined):
            raise  # as if it were lost while it verifies: another engine was looked for already
        except Exception as error:
            raise DraftLost(f"the target drafted nothing: {error}") from error

    async def lost(self) -> None:
        """The target decodes alone from now on."""
        self._is_lost = True
        self._proposed = False
        self._session.statistics.fallback = DraftLost("").code
