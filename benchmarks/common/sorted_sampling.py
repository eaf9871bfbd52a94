"""The reference of `rapid.sampling`: dense penalties, a nucleus by sorting the vocabulary, a draw by inversion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rapid.sampling.params import LogitParams, SamplingParams


def adjusted(params: LogitParams, logits: Tensor, output: list[int], draft: Sequence[int]) -> Tensor:
    """``logits`` [γ+1, V] with biases and penalties: row i follows ``output`` and the first i tokens of ``draft``."""
    size = logits.shape[-1]
    bias = torch.zeros(size).index_add_(
        0, torch.tensor(list(params.logit_bias), dtype=torch.long), torch.tensor(list(params.logit_bias.values()))
    )
    in_prompt = torch.zeros(size, dtype=torch.bool)
    in_prompt[list(params.prompt)] = True
    counts = torch.bincount(torch.tensor(output), minlength=size).float().repeat(len(draft) + 1, 1)
    for i, token in enumerate(draft):
        counts[i + 1 :, token] += 1
    logits, written = logits + bias, counts > 0
    penalised = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
    logits = torch.where(written | in_prompt, penalised, logits)
    return logits - params.frequency_penalty * counts - params.presence_penalty * written


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    scaled = (logits - logits.amax(-1, keepdim=True)) / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        kth = scaled.topk(params.top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < kth, -torch.inf)
    if params.top_p < 1:
        # Stable, so that of equally likely tokens those with the larger ids are kept.
        ascending, order = scaled.sort(dim=-1, stable=True)
        drop = ascending.softmax(-1).cumsum(-1, dtype=torch.float64) <= 1 - params.top_p
        drop[..., -1] = False
        scaled = scaled.masked_fill(torch.zeros_like(drop).scatter_(-1, order, drop), -torch.inf)
    probs = scaled.softmax(-1)
    if params.min_p > 0:
        probs = probs.masked_fill(probs < params.min_p * probs.amax(-1, keepdim=True), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def sample(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverts the cumulated rows of ``probs`` [..., V] at ``uniform`` [...]."""
    cumulated = probs.double().cumsum(-1)
    drawn = torch.searchsorted(cumulated, uniform.unsqueeze(-1) * cumulated[..., -1:], right=True).squeeze(-1)
    return drawn.clamp_max(probs.shape[-1] - 1)
