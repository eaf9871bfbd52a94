"""The decode loop: ask for offers, choose, propose, verify, roll back, emit, until done. Start reading here.

`generate` works through a `Backend`, which retrieves passages and leases sequences on engines. In one process that is
`rapid.backend.local.LocalBackend`; on a cluster the engines are processes of their own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import Any

from rapid.backend.leases import TargetLease
from rapid.backend.protocol import Backend, Retrieval, Role
from rapid.drafters.interface import Drafter, drafter_class
from rapid.drafters.session import Retrieve, Session
from rapid.engine.messages import SequenceRequest, VerifyRequest
from rapid.errors import ContextLengthExceeded, DraftLost, RetrievalFailed
from rapid.events import Delta, Finish, Statistics
from rapid.output import OutputWriter
from rapid.request import GenerationRequest
from rapid.speculation.controller import MAX_DRAFT_TOKENS, PLAIN_ROUND, DraftController
from rapid.speculation.draft import Draft, VerifyResult
from rapid.speculative_rag.choice import ChosenAnswer, choose_answer
from rapid.strategies import STRATEGIES

logger = logging.getLogger(__name__)


async def generate(
    request: GenerationRequest, backend: Backend, retrieve: Retrieve | None = None
) -> AsyncGenerator[Delta | Finish, None]:
    """Writes one completion. Yields a `Delta` for each round, and a `Finish` at the end.

    ``retrieve`` replaces the backend's, where several completions share one retrieval.

    The first tokens do not wait for a drafter, unless γ is fixed, the request has a seed, or it transfers everywhere.
    When a drafter is lost, the target continues alone until there is another. When the target is lost, another engine
    continues the same text. Closing the iterator early, or cancelling the task that reads it, frees all sequences.

    Raises:
        ContextLengthExceeded: prompt and output do not fit the window of the model that reads them.
        EngineLost: the target was lost, and no other engine could continue.
        Overloaded: no engine had room for the target's sequence.
    """
    started = time.perf_counter()
    session = Session(request, backend, retrieve or backend.retrieve)
    strategy, stats, output = STRATEGIES[request.speculation.strategy], session.statistics, session.output
    if strategy.chooses:
        chosen = await choose_answer(session)
        if chosen is not None:
            for event in _given_out(session, chosen, (time.perf_counter() - started) * 1e3):
                yield event
            return
    controller = DraftController(
        request.speculation.fixed_draft_tokens,
        session.learned.costs,
        timed=session.by_the_clock,
        every_position=request.speculation.transfers_everywhere,
        shares_device=not backend.overlap,
    )
    async with AsyncExitStack() as leases:
        target, drafters, max_tokens = await _open(session, leases)
        eos = frozenset[int]() if request.ignore_eos else backend.info("target").eos_token_ids
        writer = OutputWriter(request, eos, max_tokens)
        while writer.reason is None:
            round_started = time.perf_counter()
            room = max_tokens - len(output) - 1
            drafts = room > 0 or request.speculation.transfers_everywhere
            offers = [drafter.offer(room) for drafter in drafters.values()] if drafts else []
            plan = controller.choose([offer for offer in offers if offer is not None])
            drafter, draft = drafters.get(plan.source), Draft(len(output))
            if drafter is not None:
                try:
                    draft = await drafter.propose(plan.limits)
                except DraftLost as error:
                    logger.warning("going on without a drafter: %s", error.message)
                    await drafter.lost()
                    plan = PLAIN_ROUND
            transfers = drafter is not None and drafter.sampled and strategy.transfers and not session.unsure
            # The engine also rolls back: afterwards its sequence ends with the last token of the verdict.
            verdict = await target.verify(VerifyRequest(draft, transfers, session.trust))
            session.learn(verdict)
            emitted, pieces, logprobs = writer.write(verdict.tokens, verdict.logprobs)
            output += emitted
            round_ms = (time.perf_counter() - round_started) * 1e3
            controller.observe(plan, verdict, round_ms)
            for each in drafters.values():
                each.observe(verdict)
            _count_round(stats, plan.source, verdict, len(emitted), round_ms)
            counts = verdict.num_drafted, verdict.num_accepted
            times_ms = round_ms, verdict.draft_ms, verdict.verify_ms
            yield Delta(emitted, pieces, *counts, plan.source, *times_ms, stats.chunks, logprobs)
    session.keep_learned()
    stats.timings_ms["total"] = (time.perf_counter() - started) * 1e3
    _, (rest,), logprobs = writer.finish()
    yield Finish(rest, writer.reason, stats, logprobs, stop=writer.stop)


def _given_out(session: Session, chosen: ChosenAnswer, total_ms: float) -> Iterator[Delta | Finish]:
    """An answer that was chosen whole, as one round."""
    request, stats = session.request, session.statistics
    eos = frozenset[int]() if request.ignore_eos else session.backend.info("target").eos_token_ids
    writer = OutputWriter(request, eos, chosen.max_tokens)
    emitted, pieces, _ = writer.write(chosen.tokens, [])
    stats.rounds, stats.emitted, stats.timings_ms["total"] = 1, len(emitted), total_ms
    times_ms = stats.timings_ms["drafting"], stats.timings_ms["verification"]
    yield Delta(emitted, pieces, 0, 0, "answers", sum(times_ms), *times_ms, stats.chunks, [])
    _, (rest,), _ = writer.finish()
    assert writer.reason is not None  # the answer ends with an end of sequence, or has all tokens that it may have
    yield Finish(rest, writer.reason, stats)


async def _open(session: Session, leases: AsyncExitStack) -> tuple[TargetLease, dict[str, Drafter], int]:
    """Leases and prefills the target, and starts the strategy's drafters beside it.

    Returns (target, drafters by label, the most tokens to write).
    """
    request, backend, stats = session.request, session.backend, session.statistics
    spec, strategy = request.speculation, STRATEGIES[request.speculation.strategy]
    prompt, reader = request.prompt.tokens, "target"
    if strategy.reads == "retrieved":
        reader = spec.rag_model
        try:
            fits = len(prompt) + (request.max_tokens or 1) <= backend.info(_role(reader)).window
            prompt = await session.retrieved_prompt(at_any_score=not fits) or prompt
        except RetrievalFailed as error:
            logger.warning("reading the whole context: %s", error.message)
            stats.fallback = error.code
    role = _role(reader)
    max_tokens = _fit(request, prompt, backend.info(role).window)
    session.logits = request.logits.on(request.prompt.tokens, backend.info("target"))
    session.max_new_tokens = max_tokens + max(spec.fixed_draft_tokens or 0, MAX_DRAFT_TOKENS) + 1
    classes = [drafter_class(reference) for reference in strategy.drafters]
    # A transfer everywhere chooses each token with a q: the drafters whose q is none have no part in it.
    drafters = [each(session) for each in classes if each.sampled or not spec.transfers_everywhere]
    for drafter in drafters:
        leases.push_async_callback(drafter.close)
    sequence = SequenceRequest(
        prompt,
        session.max_new_tokens,
        request.sampling,
        spec,
        logits=session.logits,
        num_logprobs=request.num_logprobs,
        salt=request.salt,
    )
    target = session.target = TargetLease(backend, role, sequence, session.output, stats)
    leases.push_async_callback(target.close)
    await target.open()
    for drafter in drafters:
        at_once = session.by_the_clock and spec.num_draft_tokens == "auto" and not spec.transfers_everywhere
        await drafter.start(wait=not at_once)
    return target, {drafter.label: drafter for drafter in drafters}, max_tokens


def _role(reader: str) -> Role:
    return "drafter" if reader == "drafter" else "target"


def _fit(request: GenerationRequest, prompt: list[int], window: int) -> int:
    wanted = request.max_tokens
    fits = window - len(prompt)
    if fits < (wanted or 1):
        param = "messages" if request.prompt.is_chat else "prompt"
        raise ContextLengthExceeded(prompt_tokens=len(prompt), max_tokens=wanted or 1, window=window, param=param)
    return wanted or min(request.default_max_tokens, fits)


def _count_round(stats: Statistics, source: str, verdict: VerifyResult, num_emitted: int, elapsed_ms: float) -> None:
    stats.rounds += 1
    stats.emitted += num_emitted
    accepted = min(verdict.num_accepted, num_emitted)
    stats.drafted += verdict.num_drafted
    stats.accepted += accepted
    stats.drafted_ahead += verdict.num_ahead
    if source == "lookup":
        stats.lookup_drafted += verdict.num_drafted
        stats.lookup_accepted += accepted
    elif source == "datastore":
        stats.datastore_drafted += verdict.num_drafted
        stats.datastore_accepted += accepted
    stats.timings_ms["drafting"] += verdict.draft_ms
    stats.timings_ms["verification"] += verdict.verify_ms
    stats.timings_ms["transport"] += max(0.0, elapsed_ms - verdict.draft_ms - verdict.verify_ms)


async def generate_choices(
    request: GenerationRequest, num_choices: int, backend: Backend, *, at_once: int | None = None
) -> AsyncGenerator[Delta | Finish, None]:
    """Runs `generate` ``num_choices`` times; ``choice`` tells the events apart, and each choice ends with a `Finish`.

    At most ``at_once`` choices are written at the same time (None: all).

    The choices share the retrieval, and the keys and values of the prompt. If the request has a seed, choice i has the
    seed plus i: the same request with n = 1 and that seed writes the same text. An error in one choice ends them all.
    """
    if num_choices == 1:
        async with aclosing(generate(request, backend)) as only:
            async for delta in only:
                yield delta
        return
    shared, places = _RetrieveOnce(backend), asyncio.Semaphore(at_once or num_choices)
    events: asyncio.Queue[Delta | Finish | Exception] = asyncio.Queue()

    async def write(choice: int) -> None:
        try:
            writing = generate(_seeded(request, choice), backend, shared.retrieve)
            async with places, aclosing(writing) as deltas:
                async for event in deltas:
                    events.put_nowait(event._replace(choice=choice))
        except Exception as error:
            events.put_nowait(error)

    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(write(choice)) for choice in range(num_choices)]
    try:
        num_left = num_choices
        while num_left:
            event = await events.get()
            if isinstance(event, Exception):
                raise event
            num_left -= isinstance(event, Finish)
            yield event
    finally:
        for task in (tasks := [*tasks, *shared.tasks]):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _seeded(request: GenerationRequest, choice: int) -> GenerationRequest:
    seed = request.sampling.seed
    if seed is None:
        return request
    wrapped = (seed + choice + 2**63) % 2**64 - 2**63
    return replace(request, sampling=replace(request.sampling, seed=wrapped))


class _RetrieveOnce:
    """Asks the retriever for the first choice that needs a query, and gives the other choices the same answer."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._by_query: dict[str, asyncio.Task[Retrieval]] = {}

    @property
    def tasks(self) -> list[asyncio.Task[Retrieval]]:
        return list(self._by_query.values())

    async def retrieve(self, contents: list[str], query: str, options: Any) -> Retrieval:
        if query not in self._by_query:
            self._by_query[query] = asyncio.create_task(self._backend.retrieve(contents, query, options))
        return await asyncio.shield(self._by_query[query])
