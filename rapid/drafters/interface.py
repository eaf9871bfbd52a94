"""What every drafter is to the decode loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable
from importlib import import_module
from typing import TYPE_CHECKING

from rapid.speculation.controller import Offer
from rapid.speculation.draft import Draft, DraftLimits, VerifyResult

if TYPE_CHECKING:
    from rapid.drafters.session import Session


class Drafter(ABC):
    """Proposes tokens for one request; made anew for each, with the `Session` that the request's drafters share.

    Every round the loop asks each drafter for an `offer`, lets at most one of them `propose`, and tells all of them
    what the target made of it (`observe`). A round, for a drafter that looks tokens up:

        text     … the cat sat on the mat. The cat sat on
        offer    8 known tokens, the first of which stands with probability 0.55
        propose  "the mat"        (the controller allowed two)
        observe  "the sofa"       (one accepted, one recovered)
    """

    label: str  # in traces, statistics and metrics
    sampled: bool  # whether q is real; else each token is certain, and it is verified losslessly

    @abstractmethod
    def __init__(self, session: Session) -> None: ...

    async def start(self, *, wait: bool) -> None:  # noqa: B027 (most drafters have nothing to begin)
        """Called once the target has read the prompt. With ``wait``, returns when it is clear whether there will be
        drafts: a request with a seed must not depend on what comes first."""

    @abstractmethod
    def offer(self, room: int) -> Offer | None:
        """What this drafter could bring to the next round, of at most ``room`` tokens (≥ 1); None where nothing."""

    @abstractmethod
    def propose(self, limits: DraftLimits) -> Awaitable[Draft]:
        """The draft that was offered last, within ``limits``.

        Raises:
            DraftLost: the draft does not come; the target can do without.
        """

    def observe(self, result: VerifyResult) -> None:  # noqa: B027
        """What the target wrote in the round that has ended, whichever drafter took part."""

    async def lost(self) -> None:  # noqa: B027
        """The draft that was asked for did not come."""

    async def close(self) -> None:  # noqa: B027
        """The request is over."""


def drafter_class(reference: str) -> type[Drafter]:
    """The class that a row of the strategies' table names as "module:Class"."""
    module, _, name = reference.partition(":")
    found: type[Drafter] = getattr(import_module(f"rapid.drafters.{module}"), name)
    return found
