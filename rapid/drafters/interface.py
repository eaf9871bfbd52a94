"""The interface between the decode loop and every drafter."""

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
    """Proposes tokens for one request. Each request has its own drafters, which share the request's `Session`.

    Every round the loop asks each drafter for an `offer`, lets at most one of them `propose`, and gives all of them the
    target's result (`observe`). A round, for a drafter that looks tokens up:

        text     … the cat sat on the mat. The cat sat on
        offer    8 known tokens, the first of which is accepted with probability 0.55
        propose  "the mat"        (the controller allowed two)
        observe  "the sofa"       (one accepted, one recovered)
    """

    label: str  # in traces, statistics and metrics
    sampled: bool  # whether tokens are sampled from a q; else q is one-hot, and verification is lossless

    @abstractmethod
    def __init__(self, session: Session) -> None: ...

    async def start(self, *, wait: bool) -> None:  # noqa: B027 (most drafters have nothing to begin)
        """The loop calls this once, when the target has read the prompt.

        With ``wait`` it returns when the drafter knows whether there will be drafts: a request with a seed must not
        depend on the order of events.
        """

    @abstractmethod
    def offer(self, room: int) -> Offer | None:
        """The drafter's offer for the next round, of at most ``room`` tokens; None if it has nothing to offer."""

    @abstractmethod
    def propose(self, limits: DraftLimits) -> Awaitable[Draft]:
        """The draft that was offered last, within ``limits``.

        Raises:
            DraftLost: the draft does not come; the target continues without it.
        """

    def observe(self, result: VerifyResult) -> None:  # noqa: B027
        """Receives the target's result of the round that has ended, also when another drafter or none proposed."""

    async def lost(self) -> None:  # noqa: B027
        """The loop calls this when a requested draft did not come."""

    async def close(self) -> None:  # noqa: B027
        """The loop calls this when the request is over."""


def drafter_class(reference: str) -> type[Drafter]:
    """The class that a row of the strategies' table names as "module:Class"."""
    module, _, name = reference.partition(":")
    found: type[Drafter] = getattr(import_module(f"rapid.drafters.{module}"), name)
    return found
