"""Clients of a running service: what they ask, how they read, and whether what they got is what one alone would get."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import httpx

from benchmarks.results import DATA

MODEL = "smollm2-135m-instruct"
NEW_TOKENS = 24
DOCUMENT_CHARACTERS = 2_400  # about 600 tokens: long enough to be retrieved from
SLOW_PAUSE_S = 0.1
TIMEOUT_S = 300.0
RETRY_S = 1.0  # what the service's Retry-After says
Kind = Literal["short", "repeated", "new", "cancelled", "slow"]
MIX: dict[Kind, int] = {"short": 45, "repeated": 25, "new": 10, "cancelled": 10, "slow": 10}

SHORT = (
    *("Name three oceans.", "What is a whale?", "Count from one to ten.", "Write one sentence about the sea."),
    *("What is the capital of France?", "Name a colour.", "How many legs has a spider?", "Say good morning in French."),
    *("What do bees make?", "Why is the sky blue?", "Who wrote Hamlet?", "Name two planets."),
)
ABOUT = ("Who is speaking, and what does he want?", "Which persons are named in this passage?")
NUM_REPEATED = 4


class Question(NamedTuple):
    """``document`` None: a short chat."""

    document: int | None
    text: str

    @property
    def prompt(self) -> str:
        return self.text if self.document is None else f"{passage(self.document)}\n\n{self.text}"


REPEATED = [Question(document, text) for document in range(NUM_REPEATED) for text in ABOUT]
KNOWN = [*(Question(None, text) for text in SHORT), *REPEATED]


def passage(index: int) -> str:
    """The ``index``-th passage of two novels where they are at hand, else one made of numbered sentences."""
    if DATA.exists():
        novels = "".join(_novel(name) for name in ("moby-dick.txt", "pride-and-prejudice.txt"))
        start = 30_000 + index * DOCUMENT_CHARACTERS % (len(novels) - 40_000)
        return novels[start : start + DOCUMENT_CHARACTERS]
    sentences = (f"In room {n} of house {index} lives a person who counts {n * 7 + index} birds." for n in range(100))
    return "\n".join(sentences)[:DOCUMENT_CHARACTERS]


_NOVELS: dict[str, str] = {}


def _novel(name: str) -> str:
    return _NOVELS.setdefault(name, (DATA / name).read_text(encoding="utf-8"))


@dataclass
class Asked:
    """One request and what came of it. Times in seconds; ``status`` 0: the connection failed."""

    client: int
    kind: Kind
    question: Question
    started: float
    status: int = 0
    text: str = ""
    first_s: float | None = None
    last_s: float | None = None
    tokens: int = 0
    is_complete: bool = False
    error: str | None = None

    @property
    def per_token_s(self) -> float | None:
        if not self.is_complete or self.tokens < 2 or self.first_s is None or self.last_s is None:
            return None
        return (self.last_s - self.first_s) / (self.tokens - 1)

    @property
    def is_lost(self) -> bool:
        """Accepted, and neither finished nor given up by its client."""
        return self.status == 200 and not self.is_complete and self.kind != "cancelled"


def new_client() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits, trust_env=False)


async def ask(http: httpx.AsyncClient, url: str, question: Question, kind: Kind, client: int = 0) -> Asked:
    """Streams one greedy answer the way its ``kind`` reads."""
    asked = Asked(client, kind, question, time.perf_counter())
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": question.prompt}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "stream": True,
    }
    left = random.randrange(1, 12) if kind == "cancelled" else -1  # lines until the client goes away
    try:
        async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            asked.status = response.status_code
            if response.is_error:
                asked.error = (await response.aread()).decode()[:200]
                return asked
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    _read(asked, json.loads(line.removeprefix("data: ")))
                    left -= 1
                    if left == 0:
                        return asked
                    if kind == "slow":
                        await asyncio.sleep(SLOW_PAUSE_S)
                elif line == "data: [DONE]":
                    asked.is_complete = asked.tokens > 0 and asked.error is None
    except httpx.HTTPError as error:
        asked.error = repr(error)
    return asked


def _read(asked: Asked, data: dict[str, Any]) -> None:
    if "error" in data:
        asked.error = data["error"]["message"]
        return
    if text := "".join(choice["delta"].get("content") or "" for choice in data["choices"]):
        asked.last_s = time.perf_counter() - asked.started
        asked.first_s = asked.first_s or asked.last_s
        asked.text += text
    if "rapid" in data:
        asked.tokens = data["rapid"]["emitted"]


@dataclass
class Crowd:
    """Clients that each ask, read, and ask again. ``asked`` gathers everything; documents are new across phases."""

    url: str
    seed: int
    asked: list[Asked] = field(default_factory=list)
    next_document: int = NUM_REPEATED

    def _choose(self, chance: random.Random) -> tuple[Kind, Question]:
        kind = chance.choices(list(MIX), list(MIX.values()))[0]
        if kind == "new":
            self.next_document += 1
            return kind, Question(self.next_document, ABOUT[0])
        return kind, chance.choice(
            KNOWN[: len(SHORT)] if kind == "short" else REPEATED if kind == "repeated" else KNOWN
        )

    async def _client(self, http: httpx.AsyncClient, number: int, until: float, into: list[Asked]) -> None:
        chance = random.Random(f"{self.seed} {number} {len(self.asked)}")
        while time.perf_counter() < until:
            kind, question = self._choose(chance)
            into.append(asked := await ask(http, self.url, question, kind, number))
            if asked.status != 200:
                await asyncio.sleep(RETRY_S)

    async def run(self, clients: int, seconds: float) -> list[Asked]:
        """``clients`` of them for that long, until the last answer has ended."""
        asked: list[Asked] = []
        async with new_client() as http:
            until = time.perf_counter() + seconds
            await asyncio.gather(*(self._client(http, number, until, asked) for number in range(clients)))
        self.asked += asked
        return asked

    async def burst(self, requests: int) -> list[Asked]:
        """So many requests at the same moment."""
        chance = random.Random(self.seed)
        async with new_client() as http:
            questions = chance.choices(KNOWN, k=requests)
            kinds: list[Kind] = ["short" if question.document is None else "repeated" for question in questions]
            each = zip(kinds, questions, range(requests), strict=True)
            asked = await asyncio.gather(*(ask(http, self.url, q, kind, number) for kind, q, number in each))
        self.asked += asked
        return list(asked)


class Checker:
    """Compares answers with those that were got alone.

    Where numbers are rounded to bfloat16 two tokens may be nearly as likely, and which one wins may depend on what else
    was in the batch: such an answer ``diverged``. One that begins like another question's is ``mixed_up``.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self.alone: dict[Question, str] = {}

    async def learn(self, questions: list[Question]) -> None:
        """Asks each alone, one after the other."""
        async with new_client() as http:
            for question in questions:
                if question not in self.alone:
                    asked = await ask(http, self._url, question, "short")
                    if not asked.is_complete:
                        raise RuntimeError(f"{question.text!r} asked alone: {asked.status} {asked.error}")
                    self.alone[question] = asked.text

    def judge(self, answers: list[Asked]) -> dict[str, Any]:
        """How many were as alone, diverged, mixed up, lost, or not compared (documents that were not asked again)."""
        counts = dict.fromkeys(("checked", "identical", "diverged", "mixed_up", "lost", "not_compared"), 0)
        examples = []
        for asked in answers:
            alone = self.alone.get(asked.question)
            counts["lost"] += asked.is_lost
            if not asked.is_complete and asked.kind != "cancelled":
                continue
            if alone is None:
                counts["not_compared"] += 1
                continue
            verdict = self._compare(asked, alone)
            counts["checked"] += 1
            counts[verdict] += 1
            if verdict != "identical":
                examples.append({"got": asked.text, "alone": alone, "verdict": verdict})
        return counts | {"examples": examples[:5]}

    def _compare(self, asked: Asked, alone: str) -> str:
        if asked.text == alone or (asked.kind == "cancelled" and alone.startswith(asked.text)):
            return "identical"
        own = _common(asked.text, alone)
        others = (text for question, text in self.alone.items() if question != asked.question and text != alone)
        return (
            "mixed_up"
            if max((_common(asked.text, other) for other in others), default=0) > max(own, 20)
            else "diverged"
        )


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def documents(answers: list[Asked]) -> Iterator[Question]:
    """The new ones that were answered."""
    return (asked.question for asked in answers if asked.kind == "new" and asked.is_complete)
