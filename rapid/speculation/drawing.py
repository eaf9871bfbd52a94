"""Draws the drafter's tokens, a token for each row of logits, with the truncated q that each was drawn from.

These are functions of tensors on the device with static shapes, so that a CUDA graph may hold them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rapid.sampling.row_params import RowParams
from rapid.sampling.sampler import first_to_come, tempered_largest, warp_largest
from rapid.sampling.truncation import truncate_largest


class DrawnTokens(NamedTuple):
    """B draft tokens: ``tokens`` [B], their ``confidences`` [B], and q as ``ids`` and ``weights`` [B, k].

    A confidence is the drafter's probability of the token at temperature 1. q of a token that was drawn greedily is
    one-hot, so k is 0 there.
    """

    tokens: Tensor
    confidences: Tensor
    ids: Tensor
    weights: Tensor


def draw(
    logits: Tensor, params: RowParams, draft_top_k: int, keys: Tensor | None, ids: Tensor | None = None
) -> DrawnTokens:
    """Samples a token from each row of ``logits`` [B, V] with its key [B]; no temperature may be 0.

    Without ``keys`` each token is the likeliest of its q: q then serves a transfer everywhere. ``ids`` [B, V] are the
    tokens of the columns, if these are not all tokens in their order.
    """
    columns, weights = truncated(logits, params, draft_top_k)
    of_columns = columns if ids is None else ids.gather(-1, columns)
    best = torch.zeros_like(columns[:, :1]) if keys is None else first_to_come(weights, of_columns, keys)
    tokens = of_columns.gather(-1, best).squeeze(-1)
    return DrawnTokens(tokens, confidences(logits, columns.gather(-1, best).squeeze(-1)), of_columns, weights)


def draw_in_graph(
    logits: Tensor, columns: Tensor, draft_top_k: Tensor, keys: Tensor, *, most: int, truncates: bool
) -> DrawnTokens:
    """`draw`, or the likeliest token where the temperature is 0, of rows whose parameters only the device knows.

    ``columns`` are those of `RowParams`; ``draft_top_k`` [B] is at most ``most``, which gives q its width; without
    ``truncates`` no row has top-k, top-p or min-p. The q of a row at temperature 0 is of no meaning.
    """
    params = RowParams((), columns)
    top, ids = logits.topk(min(most, logits.shape[-1]))  # the largest first
    probs = tempered_largest(logits, top, params)
    probs = probs * (torch.arange(top.shape[-1], device=top.device) < draft_top_k.unsqueeze(-1))
    if truncates:
        probs = truncate_largest(probs, params)
    weights = probs / probs.sum(-1, keepdim=True)
    is_greedy = params.temperature == 0
    best = first_to_come(weights, ids, keys).masked_fill(is_greedy, 0)
    tokens = ids.gather(-1, best).squeeze(-1)
    return DrawnTokens(tokens, confidences(logits, tokens), ids, weights)


def draw_greedily(logits: Tensor, ids: Tensor | None = None) -> DrawnTokens:
    """The likeliest token of each row of ``logits`` [B, V]."""
    columns = logits.argmax(-1, keepdim=True)
    none = logits[:, :0]
    tokens = columns if ids is None else ids.gather(-1, columns)
    return DrawnTokens(tokens.squeeze(-1), confidences(logits, columns.squeeze(-1)), none, none)


def truncated(logits: Tensor, params: RowParams, draft_top_k: int) -> tuple[Tensor, Tensor]:
    """q of each row of ``logits`` [B, V]: the ids of its likeliest tokens [B, k], and their weights, which sum to 1."""
    top, ids = logits.topk(min(draft_top_k, logits.shape[-1]))  # the largest first
    probs = warp_largest(logits, top, params)
    return ids, probs / probs.sum(-1, keepdim=True)


def confidences(logits: Tensor, tokens: Tensor) -> Tensor:
    """The probability [B] of a token for each row of ``logits`` [B, V], at temperature 1."""
    return (logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)).exp()
