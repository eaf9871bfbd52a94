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

from rapid.engine import Extend, Sequence, Task
from rapid.sampling import probabilities, sample, truncate
from rapid.speculative import RULES, verify

Pairs = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Draft:
    """γ tokens from output position ``offset`` on, and the truncated q each was sampled from.

    ``distributions[i]`` is (token ids int32 [k], probabilities float32 [k]) with k ≤ draft_top_k, summing to 1. This is
    all of q that exists, so a few hundred bytes a token travel instead of a whole vocabulary row.
    """

    offset: int
    tokens: list[int] = field(default_factory=list)
    distributions: list[Pairs] = field(default_factory=list)
    elapsed_ms: float = 0.0

    def dense(self, vocab_size: int, device: torch.device) -> Tensor:
        """q as a [γ, V] float32 tensor."""
        probs = torch.zeros(len(self.tokens), vocab_size)
        for row, (ids, weights) in zip(probs, self.distributions, strict=True):
            row[torch.from_numpy(ids.astype(np.int64))] = torch.from_numpy(weights.copy())
        return probs.to(device)


@dataclass(frozen=True)
class Verified:
    """One round's outcome: ``tokens`` are the accepted drafts and the one token that follows them."""

    tokens: list[int]
    num_drafted: int
    num_accepted: int
    draft_ms: float
    verify_ms: float


def prefill(sequence: Sequence, prompt: list[int]) -> Task[float]:
    """Fills the cache with all of ``prompt`` but its last token, which the first round feeds. Returns milliseconds."""
    started = time.perf_counter()
    sequence.prompt = prompt
    if len(prompt) > 1:
        yield Extend(sequence, prompt[:-1], 0)
    return _ms_since(started)


def propose(
    sequence: Sequence, offset: int, tokens: list[int], num_draft_tokens: int, draft_top_k: int, eos: frozenset[int]
) -> Task[Draft]:
    """Samples up to ``num_draft_tokens`` tokens after the output up to ``offset`` and the newly emitted ``tokens``.

    Whatever was drafted before and does not agree with ``tokens`` is rolled back. The draft ends at an end of sequence.
    """
    started = time.perf_counter()
    sequence.rebase(offset, tokens)
    start = len(sequence.output)
    distributions: list[Pairs] = []
    while len(distributions) < num_draft_tokens:
        logits = yield Extend(sequence, sequence.pending(), 1)
        ids, weights = truncate(probabilities(logits[0], sequence.sampling), draft_top_k)
        token = int(ids[sample(weights, sequence.generator)])
        distributions.append((ids.int().cpu().numpy(), weights.cpu().numpy()))
        sequence.output.append(token)
        if token in eos:
            break
    return Draft(start, sequence.output[start:], distributions, _ms_since(started))


def verify_draft(sequence: Sequence, draft: Draft, rule: str, transfer_strength: float) -> Task[Verified]:
    """One round on the target: scores [last token; draft] in one pass, accepts or recovers, rolls back (paper §3.3).

    Raises:
        ValueError: the draft was made for another position of the output.
    """
    started = time.perf_counter()
    if draft.offset != len(sequence.output):
        raise ValueError(f"a draft for output position {draft.offset} met a sequence at {len(sequence.output)}")
    gamma = len(draft.tokens)
    logits = yield Extend(sequence, sequence.pending() + draft.tokens, gamma + 1)
    target_probs = probabilities(logits, sequence.sampling)  # [γ+1, V]
    num_accepted, next_token = verify(
        RULES[rule],
        torch.tensor(draft.tokens, dtype=torch.long, device=logits.device),
        draft.dense(logits.shape[-1], logits.device),
        target_probs,
        transfer_strength,
        sequence.generator,
    )
    emitted = [*draft.tokens[: int(num_accepted)], int(next_token)]
    sequence.output += emitted
    sequence.cache.truncate(len(sequence.prompt) + len(sequence.output) - 1)
    return Verified(emitted, gamma, int(num_accepted), draft.elapsed_ms, _ms_since(started))


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
