"""What an engine is asked to do for a request: prefill a prompt, propose a draft, verify a draft.

Each is a task for `rapid.engine.Engine`. Positions are counted in the output: ``offset`` is the number of output tokens
that the caller has, so that a lost or doubled token is an error and never a wrong text.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rapid.attention import Tokens
from rapid.control import DraftLimits
from rapid.drafts import Draft, DraftedToken, Logprobs, Prefilled, Verified
from rapid.sampling import SamplingParams, probabilities, sample
from rapid.sequence import Deliver, Extend, Sequence, Task
from rapid.speculative import RULES, output_law, verify, verify_greedy

Drawn = tuple[Tensor, Tensor, Tensor, Tensor]  # a token, ids [k], their q [k], confidence: on the device
Drafting = Generator[Extend | Deliver, Tensor | None, float]


def prefill(sequence: Sequence) -> Task[Prefilled]:
    """Fills the cache with all of the prompt but its last token, which the first round feeds."""
    started = time.perf_counter()
    if len(sequence.prompt) - 1 > sequence.cache.length:
        yield Extend(sequence, None, 0)
    return Prefilled(sequence.cached_tokens, _ms_since(started))


def propose(
    sequence: Sequence, offset: int, tokens: list[int], limits: DraftLimits, draft_top_k: int, eos: frozenset[int]
) -> Task[Draft]:
    """Samples a draft after the output up to ``offset`` and the newly emitted ``tokens``.

    Whatever was drafted before and does not agree with ``tokens`` is rolled back; what it drafted ahead behind
    them, if they came as it guessed, is the beginning of this draft. The draft ends at an end of sequence, or where
    ``limits`` say that its next token would hardly stand.

    This much is done by whoever asks, while the engine may be in a pass: one that follows a wrong guess ends early.
    """
    before, rest = sequence.drafting_ahead, Future[Any]() if limits.ahead else None
    if before is not None and sequence.ahead is not None and sequence.position >= offset:
        drafted = sequence.output[offset - sequence.written :] + sequence.ahead.tokens
        if any(ours != theirs for ours, theirs in zip(drafted, tokens, strict=False)):
            before.cancel()
    sequence.drafting_ahead = rest
    return _propose(sequence, offset, tokens, limits, draft_top_k, eos, before, rest)


def _propose(
    sequence: Sequence,
    offset: int,
    tokens: list[int],
    limits: DraftLimits,
    draft_top_k: int,
    eos: frozenset[int],
    before: Future[Any] | None,
    rest: Future[Any] | None,
) -> Task[Draft]:
    """``before`` is what the last one still drafts ahead, ``rest`` what this one is to."""
    started = time.perf_counter()
    try:
        ahead = _stop_drafting_ahead(sequence, before)
        start = offset + len(tokens)
        # Its first token is a guess of the one that follows an accepted draft. Only past that was anything drafted.
        guessed = sequence.output[offset - sequence.written :][: len(tokens)] == tokens
        known = ahead.after(start) if ahead is not None and guessed and ahead.offset < start else Draft(start)
        sequence.rebase(offset, tokens, len(known.tokens))
        draft, ended = known.within(limits, eos)
        num_ahead, num_pending = len(draft.tokens), len(sequence.pending())
        first_ms = 0.0
        if not ended:
            # What is asked of the logits may depend on the tokens, which the host then has to see one by one.
            at_once = sequence.generator.device.type != "cpu" and sequence.logits is None
            first_ms = yield from _draw_on(sequence, draft, limits, draft_top_k, eos, at_once=at_once)
        sequence.output[start - sequence.written :] = draft.tokens
        sequence.cache.truncate(len(sequence.prompt) + len(sequence.output) - 1)
        elapsed_ms, more = _ms_since(started), len(draft.tokens) - num_ahead - 1
        step_ms = (elapsed_ms - first_ms) / more if more > 0 else elapsed_ms if first_ms and num_pending <= 2 else 0.0
        draft = replace(draft, elapsed_ms=elapsed_ms, step_ms=step_ms, num_ahead=num_ahead)
        if rest is None:
            return draft
        ahead = sequence.ahead = Draft(sequence.position)
        yield Deliver(draft, rest)
        if not eos & set(draft.tokens[-1:]):
            yield from _draw_on(sequence, ahead, limits.longer(1), draft_top_k, eos, at_once=False)
        return draft.followed_by(ahead)
    except BaseException:
        if rest is not None:
            rest.cancel()
        raise


async def drafted_ahead(drafting: Future[Draft] | None) -> Draft | None:
    """Of a sequence's `drafting_ahead`, once it is done; None where it was stopped.

    This is the latest draft, and behind it, as if all of it stood, ``num_ahead`` tokens: a guess of the next one and
    a draft behind that. The guess is only compared with what the target sampled without knowing it, and what is
    drafted behind it comes from the same q as if it were drafted later. So which tokens are written is as likely as
    without, under every rule.
    """
    if drafting is None:
        return None
    waiting = asyncio.wrap_future(drafting)
    await asyncio.wait([waiting])
    return None if waiting.cancelled() else waiting.result()


def _stop_drafting_ahead(sequence: Sequence, drafting: Future[Any] | None) -> Draft | None:
    """What was drafted ahead so far, now part of the sequence's output."""
    if drafting is not None:
        drafting.cancel()
    ahead, sequence.ahead = sequence.ahead, None
    if ahead is not None:
        sequence.output += ahead.tokens
    return ahead


def _draw_on(
    sequence: Sequence, draft: Draft, limits: DraftLimits, draft_top_k: int, eos: frozenset[int], *, at_once: bool
) -> Drafting:
    """Samples onto ``draft`` until it ends; returns after how many milliseconds the first token was there.

    Tokens come to the host one by one, or ``at_once``: a GPU would otherwise wait for each. What then lies behind the
    end is dropped.
    """
    started, first_ms = time.perf_counter(), 0.0
    drawn: list[Drawn] = []
    feed: Tokens = sequence.pending()
    ended = False
    while not ended:
        logits = yield Extend(sequence, feed, 1)
        assert logits is not None
        if sequence.logits is not None:
            logits = sequence.logits(logits, sequence.emitted(draft.offset) + draft.tokens)
        drawn.append(_draw(logits[0], sequence.sampling, draft_top_k, sequence.generator))
        feed = drawn[-1][0].view(1)
        first_ms = first_ms or _ms_since(started)
        if not at_once or len(draft.tokens) + len(drawn) == limits.max_tokens:
            ended = any(draft.append(token, limits, eos) for token in _bring(drawn))
            drawn = []
    return first_ms


def _draw(logits: Tensor, sampling: SamplingParams, draft_top_k: int, generator: torch.Generator) -> Drawn:
    """One token from the drafter's ``logits`` [V]."""
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        ids, weights = token.view(1), torch.ones(1, device=logits.device)
    else:
        top, ids = probabilities(logits, sampling).topk(min(draft_top_k, len(logits)))
        weights = top / top.sum()
        token = ids[sample(weights, generator)]
    return token, ids, weights, (logits[token] - logits.logsumexp(-1)).exp()


def _bring(drawn: list[Drawn]) -> Iterator[DraftedToken]:
    """What was ``drawn``, with one copy from the device."""
    columns = [torch.stack(column).cpu() for column in zip(*drawn, strict=True)]
    for token, ids, weights, confidence in zip(*columns, strict=True):
        inside = weights > 0
        yield int(token), (ids[inside].int().numpy(), weights[inside].numpy()), float(confidence)


def verify_draft(sequence: Sequence, draft: Draft, rule: str, transfer_strength: float) -> Task[Verified]:
    """One round on the target: scores [last token; draft] in one pass, accepts or recovers, rolls back (paper §3.3).

    A draft that was looked up ends before the first token that breaks the request's grammar.

    Raises:
        ValueError: the draft was made for another position of the output, or was drawn in spite of the grammar.
    """
    started = time.perf_counter()
    if draft.offset != sequence.position:
        raise ValueError(f"a draft for output position {draft.offset} met a sequence at {sequence.position}")
    if sequence.logits is not None:
        draft = _within_grammar(draft, sequence.logits.num_allowed(sequence.emitted(draft.offset), draft.tokens))
    gamma = len(draft.tokens)
    logits = yield Extend(sequence, sequence.pending() + draft.tokens, gamma + 1)  # [γ+1, V]
    assert logits is not None
    if sequence.logits is not None:
        logits = sequence.logits(logits, sequence.emitted(draft.offset), draft.tokens)
    drafted = torch.tensor(draft.tokens, dtype=torch.long).to(logits.device)
    law = None
    if sequence.sampling.temperature == 0:
        verdict = verify_greedy(drafted, logits)
    else:
        target_probs = probabilities(logits, sequence.sampling)
        draft_probs = draft.dense(logits.shape[-1], logits.device)
        verdict = verify(RULES[rule], drafted, draft_probs, target_probs, transfer_strength, sequence.generator)
        if sequence.num_logprobs is not None:
            law = output_law(RULES[rule], draft_probs, target_probs, transfer_strength).log()
    num_accepted, next_token = torch.stack(verdict).tolist()  # the one copy to the host
    emitted = [*draft.tokens[:num_accepted], next_token]
    logprobs = []
    if sequence.num_logprobs is not None:
        # A greedy choice is certain, which says nothing: there it is the unwarped distribution's.
        logprobs = _logprobs(logits.log_softmax(-1) if law is None else law, emitted, sequence.num_logprobs)
    sequence.output += emitted
    sequence.cache.truncate(len(sequence.prompt) + len(sequence.output) - 1)
    return Verified(
        emitted,
        gamma,
        num_accepted,
        draft.num_ahead,
        draft.confidences,
        draft.elapsed_ms,
        draft.step_ms,
        _ms_since(started),
        logprobs,
    )


def _within_grammar(draft: Draft, num_allowed: int) -> Draft:
    """``draft`` up to the first token that breaks the grammar.

    To cut a draft because of a token that was drawn would move the output's law. Of one that was looked up there was no
    choice, and a drafter, which knows the grammar, draws none.
    """
    if num_allowed < len(draft.tokens) and len(draft.distributions[num_allowed][0]) > 1:
        raise ValueError(f"the drafter drew token {draft.tokens[num_allowed]}, which breaks the grammar")
    return draft.before(num_allowed)


def _logprobs(log_probs: Tensor, tokens: list[int], num_top: int) -> list[Logprobs]:
    """Of the first rows of ``log_probs`` [n, V], one for each of ``tokens``; what has no chance is left out."""
    rows = log_probs[: len(tokens)]
    own = rows.gather(-1, torch.tensor(tokens, device=rows.device).unsqueeze(-1)).squeeze(-1).tolist()
    values, ids = (part.tolist() for part in rows.topk(min(num_top, rows.shape[-1])))
    top = [[(i, v) for i, v in zip(*row, strict=True) if v > -torch.inf] for row in zip(ids, values, strict=True)]
    return [Logprobs(*each) for each in zip(own, top, strict=True)]


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
