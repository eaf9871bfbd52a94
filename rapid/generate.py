"""The decode loop: plan, propose, verify, emit, until done.

`generate` sees the world through a `Backend`, which retrieves and leases sequences on engines. In one process that is
`rapid.backend.local.LocalBackend`; on a cluster the engines are processes of their own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from rapid.backend.leases import DrafterLease, TargetLease
from rapid.backend.protocol import Backend, DraftHandle, Retrieval, Role
from rapid.drafters.lookup import Lookup
from rapid.engine.sequence import SequenceRequest
from rapid.errors import ContextLengthExceeded, DraftLost, RetrievalFailed
from rapid.events import Delta, Finish, Statistics
from rapid.output import OutputWriter
from rapid.request import GenerationRequest
from rapid.sampling.logits_processor import LogitParams
from rapid.speculation.controller import MAX_DRAFT_TOKENS, Costs, DraftController, RoundPlan
from rapid.speculation.draft import Draft, VerifyResult, certain_draft
from rapid.strategies import STRATEGIES

logger = logging.getLogger(__name__)

Retrieve = Callable[[list[str], str, Any], Awaitable[Retrieval]]

# The drafter's random numbers must not be the target's: acceptance has to be independent of what was drafted.
_DRAFTER_SEED = 0x5DEECE66D


async def generate(
    request: GenerationRequest, backend: Backend, retrieve: Retrieve | None = None
) -> AsyncGenerator[Delta | Finish, None]:
    """Writes one completion. Yields a `Delta` a round, and a `Finish` at the end.

    ``retrieve`` takes the place of the backend's, where several completions share what is retrieved.

    The first tokens do not wait for the drafter, unless γ is fixed or the request has a seed that must be honoured.
    A drafter that is lost is done without until there is another; a target that is lost is replaced, and the same text
    goes on. Closing the iterator early, or cancelling the task that reads it, frees both sequences.

    Raises:
        ContextLengthExceeded: prompt and output do not fit the window of the model that reads them.
        EngineLost: the target was lost, and no other could be had.
    """
    started = time.perf_counter()
    spec, strategy = request.speculation, STRATEGIES[request.speculation.strategy]
    rule, transfer_strength = (spec.verification, spec.transfer_strength) if strategy.transfers else ("lossless", 0.0)
    stats = Statistics(spec.strategy, prompt_tokens=len(request.prompt.tokens))
    by_the_clock = request.sampling.seed is None or request.sampling.temperature == 0
    costs = replace(backend.costs) if by_the_clock else Costs()
    controller = DraftController(spec.fixed_draft_tokens, costs, timed=by_the_clock)
    output: list[int] = []
    async with AsyncExitStack() as leases:
        retrieve = retrieve or backend.retrieve
        target, drafter, max_tokens = await _prepare(request, backend, retrieve, leases, output, stats)
        if drafter is not None and not (by_the_clock and spec.num_draft_tokens == "auto"):
            await drafter.first_try()
        lookup = await asyncio.to_thread(Lookup, request.prompt.tokens) if strategy.looks_up else None
        eos = frozenset[int]() if request.ignore_eos else backend.info("target").eos_token_ids
        writer = OutputWriter(request, eos, max_tokens)
        while writer.reason is None:
            round_started = time.perf_counter()
            room = max_tokens - len(output) - 1
            found = lookup.find(room) if lookup is not None and room > 0 else None
            plan = controller.plan(room, can_draft=drafter is not None and drafter.is_ready, found=found)
            draft: DraftHandle | Draft = Draft(len(output))
            if plan.source == "lookup":
                draft = certain_draft(len(output), list(plan.tokens))
            elif plan.source == "model" and drafter is not None:
                # How far it comes ahead depends on the clock, and with that which random numbers are used for what.
                limits = replace(plan.limits, ahead=backend.overlap and by_the_clock)
                draft = drafter.propose(limits, spec.draft_top_k)
            # What was looked up has no q worth transferring.
            how = (rule, transfer_strength) if plan.source == "model" else ("lossless", 0.0)
            try:
                verified = await target.verify(draft, *how)
            except DraftLost as error:
                assert drafter is not None
                logger.warning("going on without a drafter: %s", error.message)
                await drafter.lost()
                plan, verified = RoundPlan("none"), await target.verify(Draft(len(output)), "lossless", 0.0)
            emitted, pieces, logprobs = writer.write(verified.tokens, verified.logprobs)
            output += emitted
            if lookup is not None:
                lookup.extend(emitted)
            round_ms = (time.perf_counter() - round_started) * 1e3
            controller.observe(plan, verified, round_ms, match_length=found[0] if found else 0)
            _count_round(stats, plan, verified, len(emitted), round_ms)
            counts = verified.num_drafted, verified.num_accepted
            times_ms = round_ms, verified.draft_ms, verified.verify_ms
            yield Delta(emitted, pieces, *counts, plan.source, *times_ms, stats.chunks, logprobs)
    if by_the_clock:
        backend.costs = costs
    stats.timings_ms["total"] = (time.perf_counter() - started) * 1e3
    _, (rest,), logprobs = writer.finish()
    yield Finish(rest, writer.reason, stats, logprobs)


async def _prepare(
    request: GenerationRequest,
    backend: Backend,
    retrieve: Retrieve,
    leases: AsyncExitStack,
    output: list[int],
    stats: Statistics,
) -> tuple[TargetLease, DrafterLease | None, int]:
    """Leases and prefills the target, and starts doing so for the drafter where the strategy has one.

    Returns (target, drafter, how many tokens may be written).
    """
    spec, strategy = request.speculation, STRATEGIES[request.speculation.strategy]
    prompt = request.prompt.tokens
    reader: Role = "target"
    if strategy.retrieves and not strategy.drafts:  # "rag": one model, on the retrieved context
        reader = "drafter" if spec.rag_model == "drafter" else "target"
        try:
            prompt = await _retrieve(request, retrieve, stats) or prompt
        except RetrievalFailed as error:
            logger.warning("reading the whole context: %s", error.message)
            stats.fallback = error.code
    max_tokens = _fit(request, prompt, backend.info(reader).window)
    logits = request.logits.on(request.prompt.tokens, backend.info("target"))
    room = max_tokens + max(spec.fixed_draft_tokens or 0, MAX_DRAFT_TOKENS) + 1
    drafter = None
    if strategy.drafts:
        read = partial(_read_short, request, backend, retrieve, stats, room, logits)
        drafter = DrafterLease(backend, read, output, stats)
        leases.push_async_callback(drafter.close)
    opening = SequenceRequest(prompt, room, request.sampling, logits=logits, num_logprobs=request.num_logprobs)
    target = TargetLease(backend, reader, opening, output, stats)
    leases.push_async_callback(target.close)
    await target.open()
    return target, drafter, max_tokens


async def _read_short(
    request: GenerationRequest,
    backend: Backend,
    retrieve: Retrieve,
    stats: Statistics,
    room: int,
    logits: LogitParams | None,
) -> SequenceRequest | None:
    """What the drafter is opened with; None, with the reason in ``stats.fallback``, where there is nothing to read."""
    short = await _retrieve(request, retrieve, stats)
    if short is None:
        return None
    sampling = request.sampling
    if sampling.seed is not None:
        sampling = replace(sampling, seed=sampling.seed ^ _DRAFTER_SEED)
    opening = SequenceRequest(short, room, sampling, logits=logits)
    if opening.capacity - 1 > backend.info("drafter").window:  # the last token that it may write is never read
        stats.fallback = "drafter_window_exceeded"
        return None
    return opening


async def _retrieve(request: GenerationRequest, retrieve: Retrieve, stats: Statistics) -> list[int] | None:
    """The shortened prompt; None, with the reason in ``stats.fallback``, when there is none to be had."""
    prompt = request.prompt
    if not prompt.contents:
        stats.fallback = "no_long_context"
        return None
    started = time.perf_counter()
    retrieval = await retrieve(prompt.contents, prompt.query, request.retrieval)
    stats.timings_ms["retrieval"] = (time.perf_counter() - started) * 1e3
    stats.context_tokens, stats.retrieved_tokens = retrieval.context_tokens, retrieval.retrieved_tokens
    stats.chunks = [
        {"position": c.position, "score": round(c.score, 4), "content": c.content, "start": c.start, "end": c.end}
        for c in retrieval.chunks
    ]
    if not retrieval.chunks:
        stats.fallback = "nothing_above_threshold"
        return None
    return prompt.shortened(retrieval.chunks)


def _fit(request: GenerationRequest, prompt: list[int], window: int) -> int:
    wanted = request.max_tokens
    fits = window - len(prompt)
    if fits < (wanted or 1):
        param = "messages" if request.prompt.is_chat else "prompt"
        raise ContextLengthExceeded(prompt_tokens=len(prompt), max_tokens=wanted or 1, window=window, param=param)
    return wanted or min(request.default_max_tokens, fits)


def _count_round(
    stats: Statistics, plan: RoundPlan, verified: VerifyResult, num_emitted: int, elapsed_ms: float
) -> None:
    stats.rounds += 1
    stats.emitted += num_emitted
    accepted = min(verified.num_accepted, num_emitted)
    stats.drafted += verified.num_drafted
    stats.accepted += accepted
    stats.drafted_ahead += verified.num_ahead
    if plan.source == "lookup":
        stats.lookup_drafted += verified.num_drafted
        stats.lookup_accepted += accepted
    stats.timings_ms["drafting"] += verified.draft_ms
    stats.timings_ms["verification"] += verified.verify_ms
    stats.timings_ms["transport"] += max(0.0, elapsed_ms - verified.draft_ms - verified.verify_ms)
