"""What an engine is asked to do for a request: prefill a prompt, propose a draft, verify a draft.

Each is a task for `rapid.engine.Engine`. Positions are counted in the output: ``offset`` is the number of output tokens
that the caller has, so that a lost or doubled token is an error and never a wrong text.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rapid.control import DraftLimits
from rapid.sampling import SamplingParams, probabilities, sample
from rapid.sequence import Extend, Sequence, Task
from rapid.speculative import RULES, verify, verify_greedy

Pairs = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Draft:
    """γ tokens from output position ``offset`` on, and the truncated q each was sampled from.

    ``distributions[i]`` is (token ids int32 [k], probabilities float32 [k]) with k ≤ draft_top_k, summing to 1. This is
    all of q that exists, so a few hundred bytes a token travel instead of a whole vocabulary row.
    ``confidences[i]`` is how sure the drafter was of the token (its probability at temperature 1).
    """

    offset: int
    tokens: list[int] = field(default_factory=list)
    distributions: list[Pairs] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    elapsed_ms: float = 0.0
    step_ms: float = 0.0  # of a pass that had nothing else to read; 0 where there was none

    def dense(self, vocab_size: int, device: torch.device) -> Tensor:
        """q as a [γ, V] float32 tensor."""
        probs = torch.zeros(len(self.tokens), vocab_size)
        for row, (ids, weights) in zip(probs, self.distributions, strict=True):
            row[torch.from_numpy(ids.astype(np.int64))] = torch.from_numpy(weights.copy())
        return probs.to(device)


def certain_draft(offset: int, tokens: list[int]) -> Draft:
    """A draft that was looked up and not sampled: each q is one-hot."""
    one_hot = [(np.array([token], np.int32), np.ones(1, np.float32)) for token in tokens]
    return Draft(offset, tokens, one_hot, [1.0] * len(tokens))


@dataclass(frozen=True)
class Verified:
    """One round's outcome: ``tokens`` are the accepted drafts and the one token that follows them."""

    tokens: list[int]
    num_drafted: int
    num_accepted: int
    confidences: list[float]
    draft_ms: float
    draft_step_ms: float
    verify_ms: float


@dataclass(frozen=True)
class Prefilled:
    """``cached_tokens`` of the prompt were found in the engine's memory; the rest took ``elapsed_ms``."""

    cached_tokens: int
    elapsed_ms: float


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

    Whatever was drafted before and does not agree with ``tokens`` is rolled back. The draft ends at an end of sequence,
    or where ``limits`` say that its next token would hardly stand. Tokens come to the host one by one on a CPU, and all
    at once from a GPU, which would otherwise wait for each; what lies behind the end is dropped then.
    """
    started = time.perf_counter()
    sequence.rebase(offset, tokens)
    start = len(sequence.output)
    on_host = sequence.generator.device.type == "cpu"
    drawn: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    draft = Draft(start)
    ended, feed, first_ms = False, None, 0.0
    num_pending = len(sequence.pending())
    while not ended and len(draft.tokens) + len(drawn) < limits.max_tokens:
        logits = yield Extend(sequence, sequence.pending() if feed is None else feed, 1)
        assert logits is not None
        drawn.append(_draw(logits[0], sequence.sampling, draft_top_k, sequence.generator))
        feed = drawn[-1][0].view(1)
        first_ms = first_ms or _ms_since(started)
        if on_host or len(drawn) == limits.max_tokens:
            ended = _bring(drawn, draft, limits, eos)
            drawn = []
    sequence.output[start:] = draft.tokens
    sequence.cache.truncate(len(sequence.prompt) + len(sequence.output) - 1)
    elapsed_ms, more = _ms_since(started), len(draft.tokens) - 1
    step_ms = (elapsed_ms - first_ms) / more if more else elapsed_ms if num_pending <= 2 else 0.0
    return Draft(start, draft.tokens, draft.distributions, draft.confidences, elapsed_ms, step_ms)


def _draw(
    logits: Tensor, sampling: SamplingParams, draft_top_k: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One token from the drafter's ``logits`` [V]: (token, ids [k], q of those [k], confidence), all on the device."""
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        ids, weights = token.view(1), torch.ones(1, device=logits.device)
    else:
        top, ids = probabilities(logits, sampling).topk(min(draft_top_k, len(logits)))
        weights = top / top.sum()
        token = ids[sample(weights, generator)]
    return token, ids, weights, (logits[token] - logits.logsumexp(-1)).exp()


def _bring(
    drawn: list[tuple[Tensor, Tensor, Tensor, Tensor]], draft: Draft, limits: DraftLimits, eos: frozenset[int]
) -> bool:
    """Appends what was ``drawn`` to ``draft``, with one copy from the device; True where the draft ends."""
    columns = [torch.stack(column).cpu() for column in zip(*drawn, strict=True)]
    for token, ids, weights, confidence in zip(*columns, strict=True):
        inside = weights > 0
        draft.tokens.append(int(token))
        draft.distributions.append((ids[inside].int().numpy(), weights[inside].numpy()))
        draft.confidences.append(float(confidence))
        if int(token) in eos or limits.stop_after(draft.confidences):
            return True
    return False


def verify_draft(sequence: Sequence, draft: Draft, rule: str, transfer_strength: float) -> Task[Verified]:
    """One round on the target: scores [last token; draft] in one pass, accepts or recovers, rolls back (paper §3.3).

    Raises:
        ValueError: the draft was made for another position of the output.
    """
    started = time.perf_counter()
    if draft.offset != len(sequence.output):
        raise ValueError(f"a draft for output position {draft.offset} met a sequence at {len(sequence.output)}")
    gamma = len(draft.tokens)
    logits = yield Extend(sequence, sequence.pending() + draft.tokens, gamma + 1)  # [γ+1, V]
    assert logits is not None
    drafted = torch.tensor(draft.tokens, dtype=torch.long).to(logits.device)
    if sequence.sampling.temperature == 0:
        verdict = verify_greedy(drafted, logits)
    else:
        target_probs = probabilities(logits, sequence.sampling)
        draft_probs = draft.dense(logits.shape[-1], logits.device)
        verdict = verify(RULES[rule], drafted, draft_probs, target_probs, transfer_strength, sequence.generator)
    num_accepted, next_token = torch.stack(verdict).tolist()  # the one copy to the host
    emitted = [*draft.tokens[:num_accepted], next_token]
    sequence.output += emitted
    sequence.cache.truncate(len(sequence.prompt) + len(sequence.output) - 1)
    return Verified(
        emitted, gamma, num_accepted, draft.confidences, draft.elapsed_ms, draft.step_ms, _ms_since(started)
    )


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
