"""The task that proposes a draft: rolls back to the written output, samples token by token, and may draft ahead."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rapid.engine.messages import DraftRequest
from rapid.engine.sequence import EarlyResult, ForwardRequest, Sequence, Task, ms_since
from rapid.kernels.interface import Tokens
from rapid.sampling.noise import Purpose
from rapid.sampling.params import SamplingParams
from rapid.sampling.sampler import probabilities, sample_few
from rapid.speculation.draft import Draft, DraftedToken, DraftLimits

Drawn = tuple[Tensor, Tensor, Tensor, Tensor]  # a token, ids [k], their q [k], confidence: on the device
Drafting = Generator[ForwardRequest | EarlyResult, Tensor | None, float]


def propose(sequence: Sequence, request: DraftRequest, eos: frozenset[int]) -> Task[Draft]:
    """Samples a draft behind the output; the output's tokens from ``request.offset`` on are ``request.tokens``.

    The task rolls back earlier draft tokens that differ from these tokens. If tokens were drafted ahead and these
    tokens came as guessed, the draft begins with the rest of them. The draft ends at an end of sequence, or where the
    request's limits expect that the next token would be rejected.

    The caller's thread runs this function, while the engine may be in a pass: so a pass that follows a wrong guess ends
    early. The engine runs the task that this function returns.
    """
    offset, tokens, limits = request.offset, request.tokens, request.limits
    before, rest = sequence.drafting_ahead, Future[Any]() if limits.ahead else None
    if before is not None and sequence.ahead is not None and sequence.position >= offset:
        drafted = sequence.output[offset - sequence.written :] + sequence.ahead.tokens
        if any(ours != theirs for ours, theirs in zip(drafted, tokens, strict=False)):
            before.cancel()
    sequence.drafting_ahead = rest
    return _propose(sequence, request, eos, before, rest)


def _propose(
    sequence: Sequence,
    request: DraftRequest,
    eos: frozenset[int],
    before: Future[Any] | None,
    rest: Future[Any] | None,
) -> Task[Draft]:
    """``before`` is the future of tokens that the last request still drafts ahead; ``rest`` is that of this request."""
    started = time.perf_counter()
    offset, tokens, limits = request.offset, request.tokens, request.limits
    try:
        ahead = _stop_drafting_ahead(sequence, before)
        start = offset + len(tokens)
        # The first token of `ahead` guesses the token behind an accepted draft. The drafted tokens come after it.
        guessed = sequence.output[offset - sequence.written :][: len(tokens)] == tokens
        known = ahead.after(start) if ahead is not None and guessed and ahead.offset < start else Draft(start)
        sequence.rebase(offset, tokens, len(known.tokens))
        draft, ended = known.within(limits, eos)
        num_ahead, num_pending = len(draft.tokens), len(sequence.pending())
        first_ms = 0.0
        if not ended:
            # The adjustment of the logits may depend on the tokens, so the host must see them one by one.
            at_once = sequence.noise.device.type != "cpu" and sequence.logits is None
            first_ms = yield from _draw_on(sequence, start, draft, limits, eos, at_once=at_once)
        sequence.output[start - sequence.written :] = draft.tokens
        sequence.cache.truncate(len(sequence.prompt) + len(sequence.output) - 1)
        elapsed_ms, more = ms_since(started), len(draft.tokens) - num_ahead - 1
        step_ms = (elapsed_ms - first_ms) / more if more > 0 else elapsed_ms if first_ms and num_pending <= 2 else 0.0
        draft = replace(draft, elapsed_ms=elapsed_ms, step_ms=step_ms, num_ahead=num_ahead)
        if rest is None:
            return draft
        ahead = sequence.ahead = Draft(sequence.position)
        yield EarlyResult(draft, rest)
        if not eos & set(draft.tokens[-1:]):
            yield from _draw_on(sequence, start, ahead, limits.longer(1), eos, at_once=False)
        return draft.followed_by(ahead)
    except BaseException:
        if rest is not None:
            rest.cancel()
        raise


async def drafted_ahead(drafting: Future[Draft] | None) -> Draft | None:
    """The result of a sequence's `drafting_ahead`, once it is done; None if it was stopped.

    The result is the latest draft and ``num_ahead`` tokens behind it, as if all of the draft were accepted: a guess of
    the next token, and a draft behind the guess. The guess is only compared with the token that the target sampled
    without knowing it, and the draft behind it comes from the same q as if it were drafted later. So the output's law
    is the same as without drafting ahead, under every rule.
    """
    if drafting is None:
        return None
    waiting = asyncio.wrap_future(drafting)
    await asyncio.wait([waiting])
    return None if waiting.cancelled() else waiting.result()


def _stop_drafting_ahead(sequence: Sequence, drafting: Future[Any] | None) -> Draft | None:
    """Stops drafting ahead; returns the tokens drafted so far, which are now part of the sequence's output."""
    if drafting is not None:
        drafting.cancel()
    ahead, sequence.ahead = sequence.ahead, None
    if ahead is not None:
        sequence.output += ahead.tokens
    return ahead


def _draw_on(
    sequence: Sequence, start: int, draft: Draft, limits: DraftLimits, eos: frozenset[int], *, at_once: bool
) -> Drafting:
    """Samples onto ``draft`` until it ends; returns after how many milliseconds the first token was there.

    The host reads each token as it is sampled, or, with ``at_once``, all tokens at the end, so that a GPU does not wait
    for the host between two tokens. Tokens behind the draft's end are then discarded. The random numbers are those of
    the round that begins at output position ``start``.
    """
    started, first_ms = time.perf_counter(), 0.0
    drawn: list[Drawn] = []
    draft_top_k = sequence.request.speculation.draft_top_k
    feed: Tokens = sequence.pending()
    first, ahead = len(draft.tokens), draft.offset - start
    steps = torch.arange(ahead + first, ahead + limits.max_tokens, device=sequence.noise.device)
    keys = sequence.noise.behind(start).keys(Purpose.DRAFT, steps)
    ended = False
    while not ended:
        logits = yield ForwardRequest(sequence, feed, 1)
        assert logits is not None
        if sequence.logits is not None:
            logits = sequence.logits(logits, sequence.emitted(draft.offset) + draft.tokens)
        key = keys[len(draft.tokens) + len(drawn) - first]
        drawn.append(_draw(logits[0], sequence.request.sampling, draft_top_k, key))
        feed = drawn[-1][0].view(1)
        first_ms = first_ms or ms_since(started)
        if not at_once or len(draft.tokens) + len(drawn) == limits.max_tokens:
            ended = any(draft.append(token, limits, eos) for token in _bring(drawn))
            drawn = []
    return first_ms


def _draw(logits: Tensor, sampling: SamplingParams, draft_top_k: int, key: Tensor) -> Drawn:
    """Samples one token from the drafter's ``logits`` [V]."""
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        ids, weights = token.view(1), torch.ones(1, device=logits.device)
    else:
        top, ids = probabilities(logits, sampling).topk(min(draft_top_k, len(logits)))
        weights = top / top.sum()
        token = sample_few(weights, ids, key)
    return token, ids, weights, (logits[token] - logits.logsumexp(-1)).exp()


def _bring(drawn: list[Drawn]) -> Iterator[DraftedToken]:
    """The tokens of ``drawn``, with one copy from the device for each column."""
    columns = [torch.stack(column).cpu() for column in zip(*drawn, strict=True)]
    for token, ids, weights, confidence in zip(*columns, strict=True):
        inside = weights > 0
        yield int(token), (ids[inside].int().numpy(), weights[inside].numpy()), float(confidence)
