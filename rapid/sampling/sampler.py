"""Turns logits into a probability distribution, and samples a token from a distribution.

The warping (temperature, top-k, top-p, min-p, in that order, as in transformers) applies alike to the target's and the
drafter's logits, so the paper's p and q are always the distributions that tokens are sampled from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rapid.sampling.params import SamplingParams
from rapid.sampling.truncation import truncate


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution of ``logits`` [..., V] under ``params``: same shape, rows sum to 1.

    Temperature 0 gives a one-hot row at the argmax; every verification rule then reduces to greedy decoding.
    """
    if params.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # A tiny temperature must neither turn the largest logits into inf - inf nor, rounded to 0, into 0 / 0.
    temperature = max(params.temperature, torch.finfo(logits.dtype).tiny)
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(temperature)
    return truncate(scaled.softmax(-1), params)


def sample(probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Samples one index per row of ``probs`` [..., V] (rows need not sum to 1): shape [...].

    It inverts the cumulated distribution: `torch.multinomial` takes ten times as long on a vocabulary.
    """
    cumulated = probs.double().cumsum(-1)
    uniform = torch.rand(probs.shape[:-1], generator=generator, dtype=torch.float64, device=probs.device)
    # Strictly above: a token of probability 0 has the same sum as the token before it, and must never be chosen.
    drawn = torch.searchsorted(cumulated, (uniform.unsqueeze(-1) * cumulated[..., -1:]), right=True).squeeze(-1)
    return drawn.clamp_max(probs.shape[-1] - 1)
