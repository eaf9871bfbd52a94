"""The task that says how probable given tokens are: one pass over all of them, and nothing is sampled."""

from __future__ import annotations

import torch
from torch import Tensor

from rapid.engine.messages import ScoreRequest, ScoreResult
from rapid.engine.readout import Download
from rapid.engine.sequence import ForwardRequest, Sequence, Task
from rapid.kernels.transfer import upload

MAX_ROWS = 256  # of logits at a time: each has the whole vocabulary


def score(sequence: Sequence, request: ScoreRequest) -> Task[ScoreResult]:
    """Appends ``request.tokens`` to the sequence, and gives the log-probability of each; more than `MAX_ROWS` take
    several passes."""
    found = []
    for first in range(0, len(request.tokens), MAX_ROWS):
        part = request.tokens[first : first + MAX_ROWS]
        logits = yield ForwardRequest(sequence, sequence.pending() + part[:-1], len(part))  # [len(part), V]
        found.append(_numbers(logits, upload(part, "int64", logits.device), request.num_top))
        sequence.output += part
    numbers = torch.cat(found)
    values = (yield Download(numbers.flatten())).reshape(numbers.shape)
    logprobs, ranks = values[:, 0].tolist(), values[:, 1].astype(int).tolist()
    likeliest, ids = values[:, 2 : 2 + request.num_top], values[:, 2 + request.num_top :].astype(int)
    top = [list(zip(*row, strict=True)) for row in zip(ids.tolist(), likeliest.tolist(), strict=True)]
    return ScoreResult(logprobs, ranks, top)


def _numbers(logits: Tensor, tokens: Tensor, num_top: int) -> Tensor:
    """[n, 2 + 2 · ``num_top``] float64: each token's log-probability and rank, the largest ones, and their tokens."""
    log_probs = logits.float().log_softmax(-1)  # [n, V]
    own = log_probs.gather(-1, tokens.unsqueeze(-1))
    ranks = (log_probs > own).sum(-1, keepdim=True) + 1
    top, ids = log_probs.topk(num_top)
    return torch.cat([column.double() for column in (own, ranks, top, ids)], -1)
