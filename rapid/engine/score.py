"""The task that says how probable given tokens are: one pass over all of them, and nothing is sampled."""

from __future__ import annotations

import torch

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
        ids = upload(part, "int64", logits.device).unsqueeze(-1)
        found.append(logits.float().log_softmax(-1).gather(-1, ids).flatten())
        sequence.output += part
    values = yield Download(torch.cat(found).double())
    return ScoreResult(values.tolist())
