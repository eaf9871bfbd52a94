"""What tasks want between two passes: to draw a draft token, to verify a draft, to read values on the host.

A task yields a `Draw`, a `Refine`, a `Verify` or a `Download`, and the engine sends it the answer. Each iteration
computes each kind for all tasks that want it, in a few calls on the device. Only a `Download` waits for the device, and
an iteration has at most one. So a draft that is read at its end makes the host wait once, and so does a verification.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rapid.engine.grouping import in_groups, joined
from rapid.engine.refine import Refine
from rapid.engine.verdicts import Verify
from rapid.kernels.transfer import download, upload
from rapid.sampling.noise import Noise, Purpose
from rapid.sampling.params import SamplingParams
from rapid.sampling.row_params import RowParams
from rapid.speculation.draft import DraftedToken
from rapid.speculation.drawing import draw, draw_greedily

Floats = NDArray[np.float64]


class DrawnToken(NamedTuple):
    """A drawn token [1], and all that the host may want to know of it: a row of numbers. Both are on the device."""

    token: Tensor
    values: Tensor


class Draw(NamedTuple):
    """Draws a draft token from ``logits`` [1, V]; the answer is a `DrawnToken`.

    ``sampling`` makes q of the logits, one-hot at temperature 0; if ``is_greedy`` the token is the likeliest of q. Else
    the random numbers are those of step ``step`` in the round that begins at output position ``round_start``.
    """

    logits: Tensor
    sampling: SamplingParams
    is_greedy: bool
    draft_top_k: int
    seed: int
    round_start: int
    step: int

    @staticmethod
    def together(wishes: Sequence[Draw]) -> list[DrawnToken]:
        def kind(wish: Draw) -> Hashable:
            return wish.sampling.temperature > 0 and (wish.draft_top_k, wish.is_greedy)

        return in_groups(wishes, kind, _draw)


class Download(NamedTuple):
    """Reads ``values`` (float64 [n]) on the host; the answer is the same as an array."""

    values: Tensor

    @staticmethod
    def together(wishes: Sequence[Download]) -> list[Floats]:
        ends = np.cumsum([len(values) for (values,) in wishes])
        return np.split(download(joined([values for (values,) in wishes])), ends[:-1])


Readout = Draw | Refine | Verify | Download


def drafted_token(values: Floats) -> DraftedToken:
    """The token, q and confidence of a `DrawnToken`, from its values on the host."""
    token, confidence, pairs = int(values[0]), float(values[1]), values[2:]
    if not len(pairs):
        return token, (np.array([token], np.int32), np.ones(1, np.float32)), confidence
    ids, weights = np.split(pairs, 2)
    inside = weights > 0
    return token, (ids[inside].astype(np.int32), weights[inside].astype(np.float32)), confidence


def refined_tokens(values: Floats, num_rows: int) -> list[DraftedToken]:
    """The tokens that a `Refine` of ``num_rows`` rows emits, from its values on the host."""
    return [drafted_token(row) for row in values[1:].reshape(num_rows, -1)[: int(values[0]) + 1]]


def _draw(wishes: Sequence[Draw]) -> list[DrawnToken]:
    """Draws for wishes with one ``draft_top_k``, or for greedy ones whose q is one-hot."""
    logits = joined([each.logits for each in wishes])
    if wishes[0].sampling.temperature == 0:
        drawn = draw_greedily(logits)
    else:
        keys = None
        if not wishes[0].is_greedy:
            places = upload([(each.seed, each.round_start, each.step) for each in wishes], "int64", logits.device)
            keys = Noise(places[:, 0], places[:, 1]).keys(Purpose.DRAFT, places[:, 2:]).squeeze(-1)
        params = RowParams.of([each.sampling for each in wishes], logits.device)
        drawn = draw(logits, params, wishes[0].draft_top_k, keys)
    columns = (drawn.tokens.unsqueeze(-1), drawn.confidences.unsqueeze(-1), drawn.ids, drawn.weights)
    values = torch.cat([column.double() for column in columns], -1)
    return list(map(DrawnToken, drawn.tokens.split(1), values.unbind()))
