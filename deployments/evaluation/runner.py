"""What asks a system: one interface for models in this process, this project's servers, and other servers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from deployments.evaluation.config import Row
from deployments.evaluation.task import ChatMessage


@dataclass(frozen=True)
class Ask:
    """One request. ``source`` is the text that passages are retrieved from; "": from what the messages hold.

    With ``unread`` the system must not know the prompt from earlier requests, so that its reading can be timed.
    """

    messages: tuple[ChatMessage, ...]
    max_tokens: int
    row: Row
    temperature: float
    seed: int
    query: str = ""
    source: str = ""
    unread: bool = False


class Passage(NamedTuple):
    """What a drafter read: characters ``start`` to ``end`` of a context; ``text`` "" where only the place is known."""

    start: int
    end: int
    score: float
    text: str


@dataclass(frozen=True)
class Reply:
    """An answer, and how it came about.

    Attributes:
        tokens: how many it has; None where the server does not say.
        first_s: seconds from the request to the first text.
        decode_s: seconds for the tokens of which ``decoded`` counts: all rounds where the system gives statistics,
            else from the first text to the last, and the tokens after the first text.
        is_clocked_here: whether the client measured ``decode_s``.
        has_read: whether the system read the prompt for this answer, as far as it is known.
        pieces: (origin, text) of each run of tokens with one origin; empty where the server does not trace.
        origins: how many tokens each origin has.
        statistics: the `rapid` object; empty at other servers.
    """

    text: str
    finish: str | None
    tokens: int | None
    first_s: float
    total_s: float
    decoded: int
    decode_s: float
    is_clocked_here: bool
    has_read: bool | None
    pieces: list[tuple[str, str]] = field(default_factory=list)
    origins: dict[str, int] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    passages: list[Passage] = field(default_factory=list)


class Runner(Protocol):
    """Asks one system."""

    def refusal(self, row: Row) -> str | None:
        """Why the system cannot do what ``row`` asks; None if it can."""

    async def answer(self, ask: Ask) -> Reply:
        """
        Raises:
            RapidError: there is no answer. A status below 500 is about this question alone.
        """

    def about(self) -> dict[str, Any]:
        """What a summary says of the system."""


class Origins:
    """Collects the origins of a streamed answer's tokens."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.pieces: list[tuple[str, str]] = []
        self.in_first_round = 0

    def add(self, tokens: Iterable[dict[str, str]]) -> None:
        """The tokens of a `rapid_round` object."""
        tokens = list(tokens)
        self.in_first_round = self.in_first_round or len(tokens)
        for token in tokens:
            origin, text = token["origin"], token["text"]
            self.counts[origin] = self.counts.get(origin, 0) + 1
            if self.pieces and self.pieces[-1][0] == origin:
                self.pieces[-1] = (origin, self.pieces[-1][1] + text)
            else:
                self.pieces.append((origin, text))


_ROUNDS = ("drafting", "verification", "transport")


def decoding(statistics: dict[str, Any]) -> tuple[int, float]:
    """(tokens, seconds) of all rounds, by an answer's `rapid` object."""
    return statistics["emitted"], sum(statistics["timings_ms"][part] for part in _ROUNDS) / 1e3


def reading(statistics: dict[str, Any]) -> float:
    """The seconds until the first round, by an answer's `rapid` object: retrieval, and both prompts at once."""
    return float(statistics["timings_ms"]["total"]) / 1e3 - decoding(statistics)[1]


def has_read(cached_tokens: int, prompt_tokens: int) -> bool:
    """Whether a prompt was read for this answer: all but what templates have in common."""
    return cached_tokens < prompt_tokens / 10
