"""The decode loop: propose, verify, emit, until done; and the strategies that are written with it.

`generate` sees the world through a `Backend`, which retrieves and leases sequences on engines. In one process that is
`rapid.local.LocalBackend`; on a cluster the engines are actors, and a draft goes from the drafter to the target without
passing through here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

from rapid.errors import ContextLengthExceeded, InvalidRequest
from rapid.model_info import ModelInfo
from rapid.prompts import Prompt, RetrievedText
from rapid.sampling import SamplingParams
from rapid.speculative import RULES
from rapid.tasks import Draft, Verified
from rapid.tokenization import TextStream

Role = Literal["target", "drafter"]
DraftHandle = Awaitable[Draft]

# The drafter's random numbers must not be the target's: acceptance has to be independent of what was drafted.
_DRAFTER_SEED = 0x5DEECE66D


class Strategy(NamedTuple):
    """``retrieves``: a model reads the retrieved context. ``drafts``: it drafts from it, and the target verifies."""

    retrieves: bool
    drafts: bool
    transfers: bool


STRATEGIES: dict[str, Strategy] = {
    "autoregressive": Strategy(retrieves=False, drafts=False, transfers=False),  # the long context, plain decoding
    "rag": Strategy(retrieves=True, drafts=False, transfers=False),  # one model on the retrieved context alone
    "speculative": Strategy(retrieves=True, drafts=True, transfers=False),  # a RAG drafter, η = 0: lossless
    "rapid": Strategy(retrieves=True, drafts=True, transfers=True),
}


@dataclass(frozen=True)
class SpeculationParams:
    """How one request decodes. γ is ``num_draft_tokens``, η is ``transfer_strength`` (paper §3 and §4.1).

    ``rag_model`` says whose weights the strategy "rag" uses.

    Raises:
        InvalidRequest: a value is unknown or out of range; ``param`` names the field.
    """

    strategy: str = "rapid"
    num_draft_tokens: int = 10
    transfer_strength: float = 10.0
    verification: str = "published"
    draft_top_k: int = 64
    rag_model: str = "target"

    def __post_init__(self) -> None:
        def require(ok: bool, param: str, rule: str) -> None:
            if not ok:
                raise InvalidRequest(f"{param} must be {rule}, got {getattr(self, param)!r}", param=f"rapid.{param}")

        require(self.strategy in STRATEGIES, "strategy", f"one of {', '.join(STRATEGIES)}")
        require(0 <= self.num_draft_tokens <= 64, "num_draft_tokens", "between 0 and 64")
        require(0 <= self.transfer_strength <= 1000, "transfer_strength", "between 0 and 1000")
        require(self.verification in RULES, "verification", f"one of {', '.join(RULES)}")
        require(1 <= self.draft_top_k <= 4096, "draft_top_k", "between 1 and 4096")
        require(self.rag_model in ("target", "drafter"), "rag_model", "target or drafter")


@dataclass(frozen=True)
class GenerationRequest:
    """One completion to write. ``max_tokens`` None means ``default_max_tokens``, or less where the window ends.

    ``retrieval`` holds the retriever's options; they are passed on to the backend as they are.
    """

    prompt: Prompt
    sampling: SamplingParams
    speculation: SpeculationParams
    retrieval: Any = None
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    default_max_tokens: int = 512


class RetrievedChunk(RetrievedText, Protocol):
    """A chunk of the context: ``position`` counts all chunks in document order, ``score`` is the cosine similarity."""

    @property
    def position(self) -> int: ...
    @property
    def score(self) -> float: ...


class Retrieval(Protocol):
    """A retriever's answer: the chunks it kept, in document order, and token counts."""

    @property
    def chunks(self) -> Sequence[RetrievedChunk]: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def retrieved_tokens(self) -> int: ...


class Lease(Protocol):
    """One sequence on one engine, for as long as the context manager that gave it stays open."""

    async def prefill(self, prompt: list[int]) -> float: ...
    def propose(self, offset: int, tokens: list[int], num_draft_tokens: int, draft_top_k: int) -> DraftHandle: ...
    async def verify(self, draft: DraftHandle | Draft, rule: str, transfer_strength: float) -> Verified: ...


class Backend(Protocol):
    """Where the models and the retriever are."""

    def info(self, role: Role) -> ModelInfo: ...
    async def retrieve(self, contents: list[str], query: str, options: Any) -> Retrieval: ...
    def lease(self, role: Role, capacity: int, sampling: SamplingParams) -> AbstractAsyncContextManager[Lease]: ...


@dataclass
class Statistics:
    """What one request did; times in milliseconds. The README defines each field.

    ``transport`` is the time of the rounds that is neither drafting nor verification: messages and waiting.
    """

    strategy: str
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    prompt_tokens: int = 0
    context_tokens: int = 0
    retrieved_tokens: int = 0
    draft_prompt_tokens: int = 0
    chunks: list[dict[str, float]] = field(default_factory=list)
    fallback: str | None = None
    timings_ms: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("retrieval", "target_prefill", "draft_prefill", "drafting", "verification", "transport", "total"), 0.0
        )
    )

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted ÷ drafted; None when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens emitted per target forward pass."""
        return self.emitted / self.rounds if self.rounds else None


class Delta(NamedTuple):
    """One round's outcome: the text that it completed (may be empty) and the tokens."""

    text: str
    tokens: list[int]
    num_drafted: int
    num_accepted: int


class Finish(NamedTuple):
    """The end: ``reason`` is "stop" (end of sequence or stop string) or "length"."""

    text: str
    reason: str
    statistics: Statistics


async def generate(request: GenerationRequest, backend: Backend) -> AsyncGenerator[Delta | Finish, None]:
    """Writes one completion. Yields a `Delta` a round, and a `Finish` at the end.

    Closing the iterator early, or cancelling the task that reads it, frees both sequences.

    Raises:
        ContextLengthExceeded: prompt and output do not fit the window of the model that reads them.
    """
    started = time.perf_counter()
    spec, strategy = request.speculation, STRATEGIES[request.speculation.strategy]
    rule, transfer_strength = (spec.verification, spec.transfer_strength) if strategy.transfers else ("lossless", 0.0)
    stats = Statistics(spec.strategy, prompt_tokens=len(request.prompt.tokens))
    async with AsyncExitStack() as leases:
        target, drafter, max_tokens = await _prepare(request, backend, leases, stats)
        eos, tokenizer = backend.info("target").eos_token_ids, request.prompt.tokenizer
        text = TextStream(tokenizer, request.stop)
        output: list[int] = []
        drafter_knows = 0  # how much of the output the drafter has seen
        reason = None
        while reason is None:
            round_started = time.perf_counter()
            gamma = min(spec.num_draft_tokens, max_tokens - len(output) - 1)
            draft: DraftHandle | Draft = Draft(len(output))
            if drafter is not None and gamma > 0:
                draft = drafter.propose(drafter_knows, output[drafter_knows:], gamma, spec.draft_top_k)
                drafter_knows = len(output)
            verified = await target.verify(draft, rule, transfer_strength)
            emitted, reason = _cut(verified.tokens, eos, max_tokens - len(output))
            output += emitted
            piece = "".join(text.push(token) for token in emitted)
            if text.stopped:
                reason = "stop"
            stats.rounds += 1
            stats.emitted += len(emitted)
            stats.drafted += verified.num_drafted
            stats.accepted += min(verified.num_accepted, len(emitted))
            _count_round(stats, verified, (time.perf_counter() - round_started) * 1e3)
            yield Delta(piece, emitted, verified.num_drafted, verified.num_accepted)
    stats.timings_ms["total"] = (time.perf_counter() - started) * 1e3
    yield Finish(text.finish(), reason, stats)


async def _prepare(
    request: GenerationRequest, backend: Backend, leases: AsyncExitStack, stats: Statistics
) -> tuple[Lease, Lease | None, int]:
    """Leases and prefills what the strategy needs: (target, drafter or None, how many tokens may be written)."""
    spec, strategy = request.speculation, STRATEGIES[request.speculation.strategy]
    prompt = request.prompt.tokens

    async def open_lease(role: Role, tokens: list[int], max_tokens: int, timing: str) -> Lease:
        sampling = request.sampling
        if role == "drafter" and sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed ^ _DRAFTER_SEED)
        capacity = len(tokens) + max_tokens + spec.num_draft_tokens + 1
        lease = await leases.enter_async_context(backend.lease(role, capacity, sampling))
        stats.timings_ms[timing] = await lease.prefill(tokens)
        return lease

    if not strategy.drafts:
        role: Role = "drafter" if strategy.retrieves and spec.rag_model == "drafter" else "target"
        if strategy.retrieves:
            prompt = await _retrieve(request, backend, stats) or prompt
        max_tokens = _fit(request, prompt, backend.info(role).window)
        return await open_lease(role, prompt, max_tokens, "target_prefill"), None, max_tokens

    max_tokens = _fit(request, prompt, backend.info("target").window)

    async def open_drafter() -> Lease | None:
        short = await _retrieve(request, backend, stats)
        if short is None:
            return None
        if len(short) + max_tokens + spec.num_draft_tokens > backend.info("drafter").window:
            stats.fallback = "drafter_window_exceeded"
            return None
        stats.draft_prompt_tokens = len(short)
        return await open_lease("drafter", short, max_tokens, "draft_prefill")

    try:
        async with asyncio.TaskGroup() as both:
            target = both.create_task(open_lease("target", prompt, max_tokens, "target_prefill"))
            drafter = both.create_task(open_drafter())
    except ExceptionGroup as group:  # the first failure cancelled the other side; callers want the error itself
        raise group.exceptions[0] from None
    return target.result(), drafter.result(), max_tokens


async def _retrieve(request: GenerationRequest, backend: Backend, stats: Statistics) -> list[int] | None:
    """The shortened prompt; None, with the reason in ``stats.fallback``, when there is none to be had."""
    prompt = request.prompt
    if not prompt.contents:
        stats.fallback = "no_long_context"
        return None
    started = time.perf_counter()
    retrieval = await backend.retrieve(prompt.contents, prompt.query, request.retrieval)
    stats.timings_ms["retrieval"] = (time.perf_counter() - started) * 1e3
    stats.context_tokens, stats.retrieved_tokens = retrieval.context_tokens, retrieval.retrieved_tokens
    stats.chunks = [{"position": c.position, "score": round(c.score, 4)} for c in retrieval.chunks]
    if not retrieval.chunks:
        stats.fallback = "nothing_above_threshold"
        return None
    return prompt.shortened(retrieval.chunks)


def _fit(request: GenerationRequest, prompt: list[int], window: int) -> int:
    wanted = request.max_tokens
    fits = window - len(prompt)
    if fits < (wanted or 1):
        raise ContextLengthExceeded(prompt_tokens=len(prompt), max_tokens=wanted or 1, window=window)
    return wanted or min(request.default_max_tokens, fits)


def _cut(tokens: list[int], eos: frozenset[int], room: int) -> tuple[list[int], str | None]:
    """What of a round's tokens stands, up to an end of sequence or ``room``; and why generation ends, if it does."""
    for i, token in enumerate(tokens[:room]):
        if token in eos:
            return tokens[: i + 1], "stop"
    return tokens[:room], "length" if len(tokens) >= room else None


def _count_round(stats: Statistics, verified: Verified, elapsed_ms: float) -> None:
    stats.timings_ms["drafting"] += verified.draft_ms
    stats.timings_ms["verification"] += verified.verify_ms
    stats.timings_ms["transport"] += max(0.0, elapsed_ms - verified.draft_ms - verified.verify_ms)
