"""A target and a drafter so small that every output and its probability can be enumerated, and what to ask them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

from running import GREEDY, logits_after
from transformers import PreTrainedTokenizerFast

from rapid.backend.local import LocalBackend
from rapid.backend.protocol import Lease, Role
from rapid.engine.engine import Engine
from rapid.engine.messages import SequenceRequest, VerifyRequest
from rapid.events import Delta, Finish, Statistics
from rapid.generate import generate
from rapid.models.model import Model
from rapid.request import GenerationRequest
from rapid.speculation.draft import Draft, VerifyResult
from rapid.speculation.params import SpeculationParams
from rapid.text.prompts import Prompt, read_text


class Chunk(NamedTuple):
    content: int
    text: str
    position: int
    score: float
    start: int
    end: int


class Retrieval(NamedTuple):
    chunks: list[Chunk]
    context_tokens: int = 0
    retrieved_tokens: int = 0
    reaches_threshold: bool = True
    confidence: float = 1.0


def unsure(contents: list[str], query: str, options: Any) -> Retrieval:
    """Keeps the same, though nothing reaches its threshold."""
    return first_eight(contents, query, options)._replace(reaches_threshold=False, confidence=0.125)


def first_eight(contents: list[str], query: str, options: Any) -> Retrieval:
    """A retriever that keeps the first 8 letters of the first content."""
    return Retrieval([Chunk(0, contents[0][:8], 0, 0.5, 0, 8)], len(contents[0]), 8, confidence=0.5)


class Completion(NamedTuple):
    deltas: list[Delta]
    finish: Finish

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.tokens]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas) + self.finish.text

    @property
    def statistics(self) -> Statistics:
        return self.finish.statistics


async def complete(request: GenerationRequest, backend: LocalBackend) -> Completion:
    *deltas, finish = [event async for event in generate(request, backend)]
    return Completion(deltas, finish)


def run(request: GenerationRequest, backend: LocalBackend) -> Completion:
    return asyncio.run(complete(request, backend))


class PatientBackend(LocalBackend):
    """Overlaps, and verifies only when all that is drafted ahead is there; notes which drafts were here unasked.

    Two engines of one process compute in turns, so that what comes ahead would otherwise be a matter of luck.
    """

    def __init__(self, target: Engine, drafter: Engine, retrieve: Callable[..., Retrieval]) -> None:
        super().__init__(target, drafter, retrieve, overlap=True)
        self.were_here: list[bool] = []

    @asynccontextmanager
    async def lease(self, role: Role, request: SequenceRequest) -> AsyncIterator[Lease]:
        async with super().lease(role, request) as lease:
            yield Lease(partial(self._call, lease))

    def _call(self, lease: Lease, method: str, *message: Any) -> Awaitable[Any]:
        if method == "verify":
            # All is read here, in the request's own task: the event loop has not turned since a draft was here. A draft
            # that was waited for is done.
            asked = _asked.get(None)
            self.were_here.append(asked is None or not asked.done())
            _asked.set(None)
            return self._verify(lease, _ahead.get(None), *message)
        answer = lease.call(method, *message)
        if method == "propose":
            _asked.set(asyncio.ensure_future(answer))
        elif method == "drafted_ahead":
            _ahead.set(answer)
        return answer

    async def _verify(
        self,
        lease: Lease,
        ahead: Awaitable[Draft | None] | None,
        request: VerifyRequest,
    ) -> VerifyResult:
        if ahead is not None:
            await ahead
        return await lease.verify(request)


# Of the request's drafter, for its target.
_asked: ContextVar[asyncio.Future[Any] | None] = ContextVar("asked", default=None)
_ahead: ContextVar[Awaitable[Draft | None] | None] = ContextVar("ahead", default=None)


class World(NamedTuple):
    """A target and a drafter that disagree, on a vocabulary of letters."""

    target: Engine
    drafter: Engine
    tokenizer: PreTrainedTokenizerFast

    def backend(self, retrieve: Callable[..., Retrieval] = first_eight, *, overlap: bool = False) -> LocalBackend:
        return LocalBackend(self.target, self.drafter, retrieve, overlap=overlap)

    def patient_backend(self, retrieve: Callable[..., Retrieval] = first_eight) -> PatientBackend:
        return PatientBackend(self.target, self.drafter, retrieve)

    def prompt(self, text: str = "abcabbcacbaabcabca\n\nab") -> Prompt:
        return read_text(text, self.tokenizer, long_content_tokens=10)

    def request(
        self, *, strategy: str = "rapid", gamma: int | str = 3, max_tokens: int | None = 12, **options: Any
    ) -> GenerationRequest:
        options.setdefault("sampling", GREEDY)
        options.setdefault("prompt", self.prompt())
        speculation = SpeculationParams(
            strategy=strategy,
            num_draft_tokens=gamma,
            **{name: options.pop(name) for name in list(options) if name in SpeculationParams.__dataclass_fields__},
        )
        return GenerationRequest(speculation=speculation, max_tokens=max_tokens, **options)

    def num_sequences(self) -> int:
        return self.target.stats().num_sequences + self.drafter.stats().num_sequences


def greedily(model: Model, prompt: list[int], num_tokens: int) -> list[int]:
    """Plain decoding, the whole text anew for every token."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(logits_after(model, tokens).argmax()))
    return tokens[len(prompt) :]
