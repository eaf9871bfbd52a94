"""The strategies and the verification rules, by name: how a request may be decoded.

Only this module defines the two tables. The command line, its completion, the page, the API's description and the
README read them from here, or a test compares them. This module imports nothing of the project, so that a process
without torch can read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Strategy:
    """One row of the table.

    ``reads`` is what the target reads: the whole context, or only the passages retrieved from it. ``drafters`` are
    classes of `rapid.drafters` as "module:Class", in the order in which a fixed γ prefers them; a class is imported
    when a request needs it. With ``transfers`` a drafter's q may change the output (η, paper §3.3). With ``chooses``
    the output is one of several drafted answers; where there are none to choose from, the target writes it.
    """

    name: str
    summary: str
    reads: Literal["context", "retrieved"] = "context"
    chooses: bool = False
    drafters: tuple[str, ...] = ()
    transfers: bool = False


_RETRIEVAL, _LOOKUP = "retrieval:RetrievalDrafter", "lookup:LookupDrafter"
_DATASTORE = "datastore:DatastoreDrafter"
_SELF, _HIERARCHY = "magicdec:SelfDrafter", "triforce:HierarchyDrafter"

STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("autoregressive", "the target decodes alone, from the whole prompt"),
        Strategy("rag", "one model reads the retrieved passages alone", reads="retrieved"),
        Strategy(
            "speculative_rag",
            "several answers are drafted from parts of the passages, and the target chooses one",
            reads="retrieved",
            chooses=True,
        ),
        Strategy(
            "lookup",
            "drafts are looked up in the text itself; the output is exactly the target's own",
            drafters=(_LOOKUP,),
        ),
        Strategy(
            "rest",
            "drafts are looked up in a datastore of other texts; the output is exactly the target's own",
            drafters=(_DATASTORE,),
        ),
        Strategy(
            "speculative",
            "a drafter that reads the retrieved passages drafts; the output is exactly the target's own",
            drafters=(_RETRIEVAL,),
        ),
        Strategy(
            "magicdec",
            "the target drafts for itself over a small part of its cache; the output is exactly the target's own",
            drafters=(_SELF,),
        ),
        Strategy(
            "triforce",
            "small drafts, refined by the target over a part of its cache; the output is exactly the target's own",
            drafters=(_HIERARCHY,),
        ),
        Strategy(
            "rapid",
            "drafts from the passages and from lookups; the target's distribution is moved towards the drafter's (η)",
            drafters=(_RETRIEVAL, _LOOKUP, _DATASTORE),
            transfers=True,
        ),
    )
}

# Name → summary; `rapid.speculation.verification.RULES` has the functions.
VERIFICATION_RULES: dict[str, str] = {
    "published": "Eq. 9 and 10 of the paper as printed: shifted towards the drafter",
    "reference": "the mask of the paper's released code, with Eq. 10",
    "augmented": "exactly p̂, the renormalised Eq. 9",
    "lossless": "exactly p, the target's own distribution",
}
