"""Draws the drafter's tokens, a token for each row of logits, with the truncated q that each was drawn from.

These are functions of tensors on the device with static shapes, so that a CUDA graph may hold them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rapid.sampling.row_params import RowParams
from rapid.sampling.sampler import sample_few, tempered, warp
from rapid.sampling.truncation import by_sorting


class DrawnTokens(NamedTuple):
    """B draft tokens: ``tokens`` [B], their ``confidences`` [B], and q as ``ids`` and ``weights`` [B, k].

    A confidence is the drafter's probability of the token at temperature 1. q of a token that was drawn greedily is
    one-hot, so k is 0 there.
    """

    tokens: Tensor
    confidences: Tensor
    ids: Tensor
    weights: Tensor


def draw(logits: Tensor, params: RowParams, draft_top_k: int, keys: Tensor | None) -> DrawnTokens:
    """Samples a token from each row of ``logits`` [B, V] with its key [B]; no temperature may be 0.

    Without ``keys`` each token is the likeliest of its q: q then serves a greedy transfer.
    """
    ids, weights = truncated(logits, params, draft_top_k)
    tokens = ids[:, 0] if keys is None else sample_few(weights, ids, keys)
    return DrawnTokens(tokens, confidences(logits, tokens), ids, weights)


def draw_in_graph(
    logits: Tensor, columns: Tensor, draft_top_k: Tensor, keys: Tensor, *, most: int, truncates: bool
) -> DrawnTokens:
    """`draw`, or the likeliest token where the temperature is 0, of rows whose parameters only the device knows.

    ``columns`` are those of `RowParams`; ``draft_top_k`` [B] is at most ``most``, which gives q its width; without
    ``truncates`` no row has top-k, top-p or min-p. The q of a row at temperature 0 is of no meaning.
    """
    params = RowParams((), columns)
    probs = tempered(logits, params)
    top, ids = (by_sorting(probs, params) if truncates else probs).topk(min(most, logits.shape[-1]))
    top = top * (torch.arange(top.shape[-1], device=top.device) < draft_top_k.unsqueeze(-1))
    weights = top / top.sum(-1, keepdim=True)
    is_greedy = params.temperature.squeeze(-1) == 0
    tokens = torch.where(is_greedy, logits.argmax(-1), sample_few(weights, ids, keys))
    return DrawnTokens(tokens, confidences(logits, tokens), ids, weights)


def draw_greedily(logits: Tensor) -> DrawnTokens:
    """The likeliest token of each row of ``logits`` [B, V]."""
    tokens = logits.argmax(-1)
    none = logits[:, :0]
    return DrawnTokens(tokens, confidences(logits, tokens), none, none)


def truncated(logits: Tensor, params: RowParams, draft_top_k: int) -> tuple[Tensor, Tensor]:
    """q of each row of ``logits`` [B, V]: the ids of its likeliest tokens [B, k], and their weights, which sum to 1."""
    top, ids = warp(logits, params).topk(min(draft_top_k, logits.shape[-1]))
    return ids, top / top.sum(-1, keepdim=True)


def confidences(logits: Tensor, tokens: Tensor) -> Tensor:
    """The probability [B] of a token for each row of ``logits`` [B, V], at temperature 1."""
    return (logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)).exp()
