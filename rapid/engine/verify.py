"""The tasks on the target: prefill a prompt, verify a draft.

`rapid.engine.engine.Engine` runs them. A verification fails if its draft was made for another position of the output,
so a lost or doubled token is an error and never a wrong text.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from rapid.engine.messages import PrefillResult, VerifyRequest
from rapid.engine.sequence import ForwardRequest, Sequence, Task, ms_since
from rapid.sampling.sampler import probabilities
from rapid.speculation.draft import Draft, Logprobs, VerifyResult
from rapid.speculation.verification import LOSSLESS, RULES, Rule, output_law, verify, verify_greedy


def prefill(sequence: Sequence) -> Task[PrefillResult]:
    """Fills the cache with all of the prompt but its last token, which the first round reads."""
    started = time.perf_counter()
    if len(sequence.prompt) - 1 > sequence.cache.length:
        yield ForwardRequest(sequence, None, 0)
    return PrefillResult(sequence.cached_tokens, ms_since(started))


def verify_draft(sequence: Sequence, request: VerifyRequest) -> Task[VerifyResult]:
    """One round on the target: scores [last token; draft] in one pass, accepts or recovers, rolls back (paper §3.3).

    A draft that was looked up is cut before the first token that breaks the request's grammar.

    Raises:
        ValueError: the draft was made for another position of the output, or a sampled draft breaks the grammar.
    """
    started = time.perf_counter()
    draft, sampling, num_logprobs = request.draft, sequence.request.sampling, sequence.request.num_logprobs
    if draft.offset != sequence.position:
        raise ValueError(f"a draft for output position {draft.offset} met a sequence at {sequence.position}")
    if sequence.logits is not None:
        draft = _within_grammar(draft, sequence.logits.num_allowed(sequence.emitted(draft.offset), draft.tokens))
    gamma = len(draft.tokens)
    logits = yield ForwardRequest(sequence, sequence.pending() + draft.tokens, gamma + 1)  # [γ+1, V]
    assert logits is not None
    if sequence.logits is not None:
        logits = sequence.logits(logits, sequence.emitted(draft.offset), draft.tokens)
    drafted = torch.tensor(draft.tokens, dtype=torch.long).to(logits.device)
    law = None
    if sampling.temperature == 0:
        verdict = verify_greedy(drafted, logits)
    else:
        target_probs = probabilities(logits, sampling)
        draft_probs = dense(draft, logits.shape[-1], logits.device)
        rule, strength = _rule(request, sequence)
        noise = sequence.noise.behind(draft.offset)
        verdict = verify(rule, drafted, draft_probs, target_probs, strength, noise)
        if num_logprobs is not None:
            law = output_law(rule, draft_probs, target_probs, strength).log()
    num_accepted, next_token = torch.stack(verdict).tolist()  # the one copy to the host
    emitted = [*draft.tokens[:num_accepted], next_token]
    logprobs = []
    if num_logprobs is not None:
        # A greedy choice has probability 1, which is no information: the unwarped distribution is reported instead.
        logprobs = _logprobs(logits.log_softmax(-1) if law is None else law, emitted, num_logprobs)
    sequence.output += emitted
    sequence.cache.truncate(len(sequence.prompt) + len(sequence.output) - 1)
    return VerifyResult(
        emitted,
        gamma,
        num_accepted,
        draft.num_ahead,
        draft.confidences,
        draft.elapsed_ms,
        draft.step_ms,
        ms_since(started),
        logprobs,
    )


def _rule(request: VerifyRequest, sequence: Sequence) -> tuple[Rule, float]:
    """The verification rule and η of this draft: lossless if q may not change the output."""
    speculation = sequence.request.speculation
    return (RULES[speculation.verification], speculation.transfer_strength) if request.transfers else (LOSSLESS, 0.0)


def dense(draft: Draft, vocab_size: int, device: torch.device) -> Tensor:
    """The draft's q as a [γ, V] float32 tensor."""
    probs = torch.zeros(len(draft.tokens), vocab_size)
    for row, (ids, weights) in zip(probs, draft.distributions, strict=True):
        row[torch.from_numpy(ids.astype(np.int64))] = torch.from_numpy(weights.copy())
    return probs.to(device)


def _within_grammar(draft: Draft, num_allowed: int) -> Draft:
    """``draft`` up to the first token that breaks the grammar.

    A cut because of a sampled token would change the output's law. A looked-up draft has no choice to bias, and a
    sampling drafter applies the grammar itself, so it never draws such a token.
    """
    if num_allowed < len(draft.tokens) and len(draft.distributions[num_allowed][0]) > 1:
        raise ValueError(f"the drafter drew token {draft.tokens[num_allowed]}, which breaks the grammar")
    return draft.before(num_allowed)


def _logprobs(log_probs: Tensor, tokens: list[int], num_top: int) -> list[Logprobs]:
    """For each of ``tokens``, log-probabilities from its row of ``log_probs`` [n, V], without impossible tokens."""
    rows = log_probs[: len(tokens)]
    own = rows.gather(-1, torch.tensor(tokens, device=rows.device).unsqueeze(-1)).squeeze(-1).tolist()
    values, ids = (part.tolist() for part in rows.topk(min(num_top, rows.shape[-1])))
    top = [[(i, v) for i, v in zip(*row, strict=True) if v > -torch.inf] for row in zip(ids, values, strict=True)]
    return [Logprobs(*each) for each in zip(own, top, strict=True)]
