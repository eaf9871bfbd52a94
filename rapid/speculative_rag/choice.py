"""Speculative RAG (arXiv 2407.08223): several drafts of the whole answer, of which the target chooses one.

Each draft is an answer with a rationale, written greedily from a subset of the retrieved passages. The drafts run as
one batch in the drafter's engine. The target reads none of the passages: it scores each draft in one pass over

    question, answer, "Rationale:", rationale, "Does the rationale support the answer?", "Yes"

The score is P(answer, rationale | question, subset), which the drafter knows, times P(answer, rationale | question)
times P("Yes"), which the target tells. The first two are geometric means over the tokens, so that a long answer is not
worse for its length. The output is one of the drafts and has no law in p.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from rapid.backend.leases import TargetLease
from rapid.backend.protocol import Lease, RetrievedChunk, Role
from rapid.drafters.session import Session
from rapid.engine.messages import DraftRequest, SequenceRequest
from rapid.errors import RapidError
from rapid.sampling.params import LogitParams
from rapid.speculation.draft import DraftLimits
from rapid.speculation.params import NUM_ANSWER_CHUNKS
from rapid.speculative_rag.subsets import k_means, subsets
from rapid.text.encoding import encode

T = TypeVar("T")
logger = logging.getLogger(__name__)

RATIONALE_TOKENS = 64
_AT_A_TIME = 32  # tokens of an answer between two words of its engine: no call may take as long as an answer
RATIONALE, REFLECTION, YES = "\n\nRationale:", "\n\nDoes the rationale support the answer, yes or no?", " Yes"


class _Written(NamedTuple):
    """``tokens`` before the end of sequence, which follows if they ``ended``; and their natural log-probabilities."""

    tokens: list[int]
    logprobs: list[float]
    ended: list[int]


class _Draft(NamedTuple):
    """An answer and its rationale, from some of the retrieved chunks."""

    chunks: Sequence[RetrievedChunk]
    answer: _Written
    rationale: _Written


class ChosenAnswer(NamedTuple):
    """The tokens of the answer, an end of sequence included, and how many the request may have."""

    tokens: list[int]
    max_tokens: int


async def choose_answer(session: Session) -> ChosenAnswer | None:
    """Drafts answers and chooses one; `Statistics.answers` says of each what it was worth.

    Returns None, with the reason in ``statistics.fallback``, where nothing was retrieved or the drafts do not fit.

    Raises:
        EngineLost, Overloaded: no target could draft or score.
    """
    statistics, backend = session.statistics, session.backend
    try:
        request = session.request
        fits = len(request.prompt.tokens) + (request.max_tokens or 1) <= backend.info("target").window
        chunks = await session.retrieved(at_any_score=not fits)
        if not chunks:
            return None
        chunks = sorted(chunks, key=lambda chunk: -chunk.score)[:NUM_ANSWER_CHUNKS]
        vectors = await backend.embed([chunk.text for chunk in chunks], session.request.salt)
    except RapidError as error:
        logger.warning("answering without drafts to choose from: %s", error.message)
        statistics.fallback = error.code
        return None
    speculation = session.request.speculation
    clusters = k_means(vectors, speculation.num_clusters).tolist()
    chosen = [
        sorted((chunks[i] for i in subset), key=lambda chunk: chunk.position)
        for subset in subsets(clusters, speculation.num_answers)
    ]
    prompts = await asyncio.to_thread(lambda: [session.request.prompt.shortened(subset) for subset in chosen])
    statistics.draft_prompt_tokens = sum(map(len, prompts))
    started = time.perf_counter()
    drafted = await _draft_all(session, prompts)
    if drafted is None:
        return None
    max_tokens, written = drafted
    drafts = [_Draft(subset, *pair) for subset, pair in zip(chosen, written, strict=True)]
    statistics.timings_ms["drafting"] = (time.perf_counter() - started) * 1e3
    started = time.perf_counter()
    worth = await _together(_score(session, draft) for draft in drafts)
    statistics.timings_ms["verification"] = (time.perf_counter() - started) * 1e3
    best = max(range(len(drafts)), key=lambda i: worth[i]["score"])
    statistics.answers = [
        {"chunks": [chunk.position for chunk in draft.chunks], "tokens": len(draft.answer.tokens)}
        | {name: float(f"{value:.4g}") for name, value in worth[i].items()}
        | {"chosen": i == best}
        for i, draft in enumerate(drafts)
    ]
    answer = drafts[best].answer
    return ChosenAnswer(answer.tokens + answer.ended, max_tokens)


async def _draft_all(session: Session, prompts: list[list[int]]) -> tuple[int, list[tuple[_Written, _Written]]] | None:
    """(the most tokens of an answer, an answer and a rationale from each prompt); None if the prompts do not fit.

    Where the drafter cannot, the target drafts.
    """
    roles: tuple[Role, ...] = ("drafter", "target")
    for role in roles:
        max_tokens = _room(session, role, max(map(len, prompts)))
        if max_tokens is None:
            session.statistics.fallback = "drafter_window_exceeded"
            continue
        try:
            written = await _together(_draft(session, role, prompt, max_tokens) for prompt in prompts)
        except RapidError as error:
            if role == "target":
                raise
            logger.warning("the target drafts the answers: %s", error.message)
            session.statistics.fallback = error.code
            continue
        return max_tokens, written
    return None


def _room(session: Session, role: Role, num_prompt_tokens: int) -> int | None:
    """How many tokens an answer may have, so that it fits with its rationale; None if that is fewer than asked for."""
    request, backend = session.request, session.backend
    window = min(backend.info(role).window, backend.info("target").window)
    markers = sum(len(encode(request.prompt.tokenizer, text)) for text in (RATIONALE, REFLECTION, YES))
    fits = window - num_prompt_tokens - RATIONALE_TOKENS - markers - 2  # a draft's sequence has room for one more
    if fits < (request.max_tokens or 1):
        return None
    return request.max_tokens or min(request.default_max_tokens, fits)


async def _draft(session: Session, role: Role, prompt: list[int], max_tokens: int) -> tuple[_Written, _Written]:
    request = session.request
    logits = request.logits.on(request.prompt.tokens, session.backend.info("target"))
    answer = await _write(session, role, prompt, max_tokens, logits, ends=not request.ignore_eos)
    marker = encode(request.prompt.tokenizer, RATIONALE)
    rationale = await _write(session, role, [*prompt, *answer.tokens, *marker], RATIONALE_TOKENS, None, ends=True)
    return answer, rationale


async def _write(
    session: Session, role: Role, prompt: list[int], num_tokens: int, logits: LogitParams | None, *, ends: bool
) -> _Written:
    """Writes up to ``num_tokens`` greedily behind ``prompt``, of all tokens; an end of sequence ``ends`` it."""
    request = session.request
    sampling = replace(request.sampling, temperature=0.0)
    opened = SequenceRequest(
        prompt,
        num_tokens + 1,
        sampling,
        replace(request.speculation, draft_vocabulary="full"),
        may_wait=role == "target",  # which drafts where the drafter has no room
        logits=logits,
        salt=request.salt,
    )
    eos = session.backend.info(role).eos_token_ids
    tokens: list[int] = []
    logprobs: list[float] = []
    async with _leased(session, role, opened) as lease:
        while len(tokens) < num_tokens:
            draft = await lease.propose(
                DraftRequest(0, list(tokens), DraftLimits(min(_AT_A_TIME, num_tokens - len(tokens))))
            )
            tokens += draft.tokens
            logprobs += [math.log(max(confidence, 1e-30)) for confidence in draft.confidences]
            if ends and tokens[-1] in eos:
                return _Written(tokens[:-1], logprobs[:-1], tokens[-1:])
    return _Written(tokens, logprobs, [])


async def _score(session: Session, draft: _Draft) -> dict[str, float]:
    """What the draft is worth, and the three probabilities whose product that is."""
    prompt, (_, answer, rationale) = session.request.prompt, draft
    question = prompt.shortened([]) or prompt.tokens[:1]
    marker, reflection, yes = (encode(prompt.tokenizer, text) for text in (RATIONALE, REFLECTION, YES))
    tokens = [*answer.tokens, *marker, *rationale.tokens, *reflection, *yes]
    opened = SequenceRequest(question, len(tokens) + 1, session.request.sampling, salt=session.request.salt)
    async with _target(session, opened, tokens) as target:
        logprobs = (await target.score()).logprobs
    behind = len(answer.tokens) + len(marker)
    own = logprobs[: len(answer.tokens)] + logprobs[behind : behind + len(rationale.tokens)]
    worth = {
        "draft": _mean(answer.logprobs + rationale.logprobs),
        "self_contained": _mean(own),
        "self_reflective": math.exp(sum(logprobs[-len(yes) :])),
    }
    return worth | {"score": math.prod(worth.values()) if answer.tokens else 0.0}


async def _together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all ``works``, which run at the same time. When one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _mean(logprobs: list[float]) -> float:
    """The geometric mean of the probabilities."""
    return math.exp(sum(logprobs) / len(logprobs)) if logprobs else 0.0


@asynccontextmanager
async def _leased(session: Session, role: Role, request: SequenceRequest) -> AsyncIterator[Lease | TargetLease]:
    """A sequence whose prompt is read: a drafter's, or a target's that survives its engine."""
    if role == "target":
        async with _target(session, request) as target:
            yield target
        return
    async with session.backend.lease(role, request) as lease:
        session.statistics.timings_ms["draft_prefill"] += (await lease.prefill()).elapsed_ms
        yield lease


@asynccontextmanager
async def _target(session: Session, request: SequenceRequest, scored: Sequence[int] = ()) -> AsyncIterator[TargetLease]:
    target = TargetLease(session.backend, "target", request, [], session.statistics, scored)
    try:
        await target.open()
        yield target
    finally:
        await target.close()
