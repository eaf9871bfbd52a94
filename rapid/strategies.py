"""The strategies: how a request may be decoded."""

from __future__ import annotations

from typing import NamedTuple


class Strategy(NamedTuple):
    """``retrieves``: a model reads the retrieved context. ``drafts``: it drafts from it, and the target verifies.

    ``transfers``: the target's distribution is augmented by the drafter's. ``looks_up``: drafts come from the text too.
    """

    retrieves: bool
    drafts: bool
    transfers: bool
    looks_up: bool


STRATEGIES: dict[str, Strategy] = {
    "autoregressive": Strategy(False, False, False, False),  # the long context, plain decoding
    "rag": Strategy(True, False, False, False),  # one model on the retrieved context alone
    "lookup": Strategy(False, False, False, True),  # drafts found in the text, no drafter: lossless
    "speculative": Strategy(True, True, False, False),  # a RAG drafter, η = 0: lossless
    "rapid": Strategy(True, True, True, True),
}
