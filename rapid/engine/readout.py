"""What tasks want between two passes: to draw a draft token, to verify a draft, to read values on the host.

A task yields a `Draw`, a `Refine`, a `Verify` or a `Download`, and the engine sends it the answer. Each iteration
computes each kind for all tasks that want it, in a few calls on the device. Only a `Download` waits for the device, and
an iteration has at most one. So a draft that is read at its end makes the host wait once, and so does a verification.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rapid.engine.grouping import in_groups, joined
from rapid.engine.refine import Refine
from rapid.engine.verdicts import Verify
from rapid.kernels.transfer import download, upload
from rapid.sampling.logits_processor import Following
from rapid.sampling.noise import Noise, Purpose
from rapid.sampling.params import SamplingParams
from rapid.sampling.row_params import RowParams
from rapid.speculation.draft import DraftedToken
from rapid.speculation.drawing import DrawnTokens, draw, draw_greedily

Floats = NDArray[np.float64]


class Drawn(NamedTuple):
    """Drawn tokens: the last one [1], and all that the host may want to know of each, a row of numbers [tokens, n].

    Both are on the device.
    """

    last: Tensor
    values: Tensor


class Drawing(NamedTuple):
    """How draft tokens are drawn, up to ``num_tokens`` of them; the answer is `Drawn`.

    ``sampling`` makes q of the logits, one-hot at temperature 0; if ``is_greedy`` a token is the likeliest of q. Else
    the random numbers are those from step ``step`` on in the round that begins at output position ``round_start``.
    ``following`` adjusts the logits, and is told of the tokens. Where the host has each token at once, ``goes_on`` says
    whether another shall follow a token of that confidence.
    """

    sampling: SamplingParams
    is_greedy: bool
    draft_top_k: int
    seed: int
    round_start: int
    step: int
    num_tokens: int
    following: Following | None = None
    goes_on: Callable[[int, float], bool] = lambda token, confidence: True


class Draw(NamedTuple):
    """Draws one draft token from ``logits`` [1, V]; the answer is `Drawn`.

    ``ids`` [V] are the tokens of the columns; None if these are all tokens.
    """

    logits: Tensor
    drawing: Drawing
    ids: Tensor | None

    @staticmethod
    def together(wishes: Sequence[Draw]) -> list[Drawn]:
        return in_groups(wishes, _kind_of_draw, _draw)


class Download(NamedTuple):
    """Reads ``values`` (float64 [n]) on the host; the answer is the same as an array."""

    values: Tensor

    @staticmethod
    def together(wishes: Sequence[Download]) -> list[Floats]:
        if len(wishes) == 1:
            return [download(wishes[0].values)]
        ends = np.cumsum([len(values) for (values,) in wishes])
        return np.split(download(joined([values for (values,) in wishes])), ends[:-1])


Readout = Draw | Refine | Verify | Download


def drafted_token(values: Floats) -> DraftedToken:
    """The token, q and confidence of one of the `Drawn`, from its values on the host."""
    token, confidence, pairs = int(values[0]), float(values[1]), values[2:]
    if not len(pairs):
        return token, (np.array([token], np.int32), np.ones(1, np.float32)), confidence
    ids, weights = np.split(pairs, 2)
    inside = weights > 0
    return token, (ids[inside].astype(np.int32), weights[inside].astype(np.float32)), confidence


def refined_tokens(values: Floats, num_rows: int) -> list[DraftedToken]:
    """The tokens that a `Refine` of ``num_rows`` rows emits, from its values on the host."""
    return [drafted_token(row) for row in values[1:].reshape(num_rows, -1)[: int(values[0]) + 1]]


def _kind_of_draw(wish: Draw) -> Hashable:
    drawing = wish.drawing
    how = drawing.sampling.temperature > 0 and (drawing.draft_top_k, drawing.is_greedy)
    return how, wish.logits.shape[-1], wish.ids is None


def _draw(wishes: Sequence[Draw]) -> list[Drawn]:
    """Draws for wishes with one ``draft_top_k`` and rows of one length, or for greedy ones whose q is one-hot."""
    drawings, rows = [each.drawing for each in wishes], []
    for each, drawing in zip(wishes, drawings, strict=True):
        rows.append(each.logits if drawing.following is None else drawing.following(each.logits))
    logits = joined(rows)
    listed = [each.ids for each in wishes if each.ids is not None]
    ids = torch.stack(listed) if listed else None
    if drawings[0].sampling.temperature == 0:
        drawn = draw_greedily(logits, ids)
    else:
        keys = None
        if not drawings[0].is_greedy:
            places = upload([(each.seed, each.round_start, each.step) for each in drawings], "int64", logits.device)
            keys = draft_keys(places)
        params = RowParams.of([each.sampling for each in drawings], logits.device)
        drawn = draw(logits, params, drawings[0].draft_top_k, keys, ids)
    tokens = drawn.tokens.split(1)
    for token, drawing in zip(tokens, drawings, strict=True):
        if drawing.following is not None:
            drawing.following.write(token)
    return list(map(Drawn, tokens, drawn_values(drawn).split(1)))


def draft_keys(places: Tensor, more: int = 0) -> Tensor:
    """The keys [B] of draft tokens at ``places`` [B, 3] (seed, where the round begins, step), ``more`` steps on."""
    return Noise(places[:, 0], places[:, 1]).keys(Purpose.DRAFT, places[:, 2:3] + more).squeeze(-1)


def drawn_values(drawn: DrawnTokens) -> Tensor:
    """What the host may want to know of tokens, [B, n]: the token, its confidence, and q."""
    columns = (drawn.tokens.unsqueeze(-1), drawn.confidences.unsqueeze(-1), drawn.ids, drawn.weights)
    return torch.cat([column.double() for column in columns], -1)
