"""Clients of a running service: their questions, how they read, and their answers."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import httpx

from benchmarks.common.results import DATA

MODEL = "smollm2-135m-instruct"
NEW_TOKENS = 24
DOCUMENT_CHARACTERS = 2_400  # about 600 tokens: long enough to be retrieved from
NEW_CHARACTERS = 8_000  # about 2,000 tokens, of a document that only one question is about
# A slow reader reads nothing for this time after the first token. It asks for more tokens, and more data about each,
# than the buffers between it and the service hold. It uses small packets, because else they hold megabytes here.
SLOW_PAUSE_S = 30.0
SLOW_TOKENS = 256
SLOW_TOP_LOGPROBS = 20
SMALL_BUFFERS = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096), (socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)]
TIMEOUT_S = 300.0
RETRY_S = 1.0  # the service's Retry-After
Answer = tuple[int, AsyncIterator[str]]  # the status, and the lines
Kind = Literal["short", "repeated", "new", "cancelled", "slow"]
MIX: dict[Kind, int] = {"short": 50, "repeated": 25, "new": 10, "cancelled": 10, "slow": 5}

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
    """The ``index``-th passage of two novels if this machine has them, else one made of numbered sentences."""
    length = DOCUMENT_CHARACTERS if index < NUM_REPEATED else NEW_CHARACTERS
    if DATA.exists():
        novels = "".join(_novel(name) for name in ("moby-dick.txt", "pride-and-prejudice.txt"))
        start = 30_000 + index * length % (len(novels) - 40_000)
        return novels[start : start + length]
    sentences = (f"In room {n} of house {index} lives a person who counts {n * 7 + index} birds." for n in range(200))
    return "\n".join(sentences)[:length]


_NOVELS: dict[str, str] = {}


def _novel(name: str) -> str:
    return _NOVELS.setdefault(name, (DATA / name).read_text(encoding="utf-8"))


@dataclass
class Asked:
    """One request and its result. Times in seconds; ``status`` 0: the connection failed."""

    client: int
    kind: Kind
    question: Question
    started: float
    status: int = 0
    text: str = ""
    written: list[bytes] = field(default_factory=list)  # its tokens
    finish: str | None = None
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
        """The service accepted the request, but it neither finished nor did its client cancel it."""
        return self.status == 200 and not self.is_complete and self.kind != "cancelled"


def new_client() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits, trust_env=False)


@asynccontextmanager
async def _usually(http: httpx.AsyncClient, url: str, body: dict[str, Any]) -> AsyncIterator[Answer]:
    async with http.stream("POST", url, json=body) as response:
        yield response.status_code, response.aiter_lines()


@asynccontextmanager
async def _through_small_buffers(_: httpx.AsyncClient, url: str, body: dict[str, Any]) -> AsyncIterator[Answer]:
    """Without httpx, which sets a socket's options after it is connected, when the packet size is already agreed."""
    where, content = urlsplit(url), json.dumps(body).encode()
    small = socket.socket()
    for option in SMALL_BUFFERS:
        small.setsockopt(*option)
    small.setblocking(False)
    await asyncio.get_running_loop().sock_connect(small, (where.hostname, where.port))
    reader, writer = await asyncio.open_connection(sock=small, limit=2**12)
    head = f"POST {where.path} HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    try:
        writer.write(head.encode() + content)
        status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        yield status, _lines(reader, is_chunked=status == 200)
    finally:
        writer.close()


async def _lines(reader: asyncio.StreamReader, *, is_chunked: bool) -> AsyncIterator[str]:
    if not is_chunked:
        yield (await reader.read()).decode()
        return
    rest = b""
    while size := int(await reader.readline(), 16):
        *lines, rest = (rest + (await reader.readexactly(size + 2))[:-2]).split(b"\n")
        for line in lines:
            yield line.decode()


async def ask(
    http: httpx.AsyncClient, url: str, question: Question, kind: Kind, client: int = 0, **rapid: Any
) -> Asked:
    """Streams one greedy answer and reads it in the way of its ``kind``; ``rapid`` are options of the request."""
    asked = Asked(client, kind, question, time.perf_counter())
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": question.prompt}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "stream": True,
        "logprobs": True,  # they contain the tokens
        "rapid": rapid,
    }
    if kind == "slow":
        body |= {"max_tokens": SLOW_TOKENS, "ignore_eos": True, "top_logprobs": SLOW_TOP_LOGPROBS}
    left = random.randrange(1, 12) if kind == "cancelled" else -1  # lines until the client disconnects
    has_paused = False
    try:
        how = _through_small_buffers if kind == "slow" else _usually
        async with how(http, f"{url}/v1/chat/completions", body) as (asked.status, lines):
            if asked.status != 200:
                asked.error = "".join([line async for line in lines])[:200]
                return asked
            async for line in lines:
                if line.startswith("data: {"):
                    _read(asked, json.loads(line.removeprefix("data: ")))
                    left -= 1
                    if left == 0:
                        return asked
                    if kind == "slow" and not has_paused:
                        await asyncio.sleep(SLOW_PAUSE_S)
                        has_paused = True
                elif line == "data: [DONE]":
                    asked.is_complete = asked.tokens > 0 and asked.error is None
    except (httpx.HTTPError, OSError, EOFError) as error:
        asked.error = repr(error)
    return asked


def _read(asked: Asked, data: dict[str, Any]) -> None:
    if "error" in data:
        asked.error = data["error"]["message"]
        return
    for choice in data["choices"]:
        asked.written += [bytes(token["bytes"]) for token in (choice["logprobs"] or {"content": ()})["content"]]
        asked.finish = choice["finish_reason"] or asked.finish
    if text := "".join(choice["delta"].get("content") or "" for choice in data["choices"]):
        asked.last_s = time.perf_counter() - asked.started
        asked.first_s = asked.first_s or asked.last_s
        asked.text += text
    if "rapid" in data:
        asked.tokens = data["rapid"]["emitted"]


@dataclass
class Crowd:
    """Clients that each ask, read, and ask again. ``asked`` collects every request; each phase has new documents."""

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

    async def _client(self, number: int, until: float, into: list[Asked]) -> None:
        chance = random.Random(f"{self.seed} {number} {len(self.asked)}")
        async with new_client() as http:
            while time.perf_counter() < until:
                kind, question = self._choose(chance)
                if kind == "slow" and until - time.perf_counter() < SLOW_PAUSE_S:
                    continue  # near the end, the phase would wait for this client alone
                into.append(asked := await ask(http, self.url, question, kind, number))
                if asked.status != 200:
                    await asyncio.sleep(RETRY_S)

    async def fill(self, documents: int) -> None:
        """Makes target and drafter read this many new documents, even if drafting does not pay."""
        async with new_client() as http:
            for _ in range(documents):
                self.next_document += 1
                everything = {"num_draft_tokens": 2, "retrieval": {"threshold": -1}}
                await ask(http, self.url, Question(self.next_document, ABOUT[0]), "new", **everything)

    async def run(self, clients: int, seconds: float) -> list[Asked]:
        """Runs this many ``clients`` for ``seconds``, and waits until the last answer has ended."""
        asked: list[Asked] = []
        until = time.perf_counter() + seconds
        await asyncio.gather(*(self._client(number, until, asked) for number in range(clients)))
        self.asked += asked
        return asked

    async def burst(self, requests: int) -> list[Asked]:
        """Sends this many requests at the same moment."""
        chance = random.Random(self.seed)
        async with new_client() as http:
            questions = chance.choices(KNOWN, k=requests)
            kinds: list[Kind] = ["short" if question.document is None else "repeated" for question in questions]
            each = zip(kinds, questions, range(requests), strict=True)
            asked = await asyncio.gather(*(ask(http, self.url, q, kind, number) for kind, q, number in each))
        self.asked += asked
        return list(asked)
