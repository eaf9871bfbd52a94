"""Drafts from a datastore: how other texts went on where they went like this (REST, arXiv 2311.08252).

The draft is the single chain that most of the matching texts share. The released code verifies a tree of chains, each
sampled by itself, which is another law than p above temperature 0; one chain is verified as any other draft.
"""

from __future__ import annotations

from rapid.datastore.search import LONGEST_MATCH
from rapid.drafters.known import Known, KnownDrafter
from rapid.drafters.session import Session
from rapid.speculation.learned import Acceptance

# A token's evidence is the length of the match, drafted tokens included, times its share of the matches. Classes of it,
# and for each class the prior probability that the token is accepted.
EVIDENCE = (0.5, 1.0, 2.0, 4.0, 8.0)
EVIDENCE_PRIOR = (0.06, 0.1, 0.22, 0.36, 0.6, 0.85)


class DatastoreDrafter(KnownDrafter):
    """Continues the text as most texts of the request's datastore continued."""

    label = "datastore"

    def __init__(self, session: Session) -> None:
        super().__init__(session, lambda: Acceptance(EVIDENCE, EVIDENCE_PRIOR))
        self._datastore = session.request.datastore
        self._before = session.request.prompt.tokens[-LONGEST_MATCH:]
        if self._datastore is None and session.request.speculation.strategy == "rest":
            session.statistics.fallback = "no_datastore"

    def find(self, room: int) -> Known | None:
        if self._datastore is None:
            return None
        found = self._datastore.find((self._before + self._session.output[-LONGEST_MATCH:])[-LONGEST_MATCH:])
        if found is None or not found.tokens:
            return None
        evidence = [(found.length + i) * share for i, share in enumerate(found.shares)]
        return Known(found.tokens[:room], evidence[:room])
