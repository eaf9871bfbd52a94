"""Rounds of drafts that are all equally long, with q as rows over the vocabulary, as formulas have it."""

from __future__ import annotations

import torch
from torch import Tensor

from rapid.sampling.noise import Noise
from rapid.speculation.rows import DraftRows
from rapid.speculation.verification import Rule, Strength, Verdict, verify


def draft_rows(draft: Tensor, draft_probs: Tensor) -> DraftRows:
    """``draft`` [B, γ] and the q ``draft_probs`` [B, γ, V] that it was drawn from."""
    (count, gamma), vocab_size = draft.shape, draft_probs.shape[-1]
    sequences = torch.arange(count).repeat_interleave(gamma)
    return DraftRows(
        tokens=draft.flatten(),
        rows=torch.arange(count * gamma) + sequences,
        steps=torch.arange(gamma).repeat(count),
        sequences=sequences,
        ids=torch.arange(vocab_size).expand(count * gamma, -1),
        weights=draft_probs.flatten(0, 1),
        lengths=torch.full((count,), gamma),
        firsts=gamma * torch.arange(count),
        longest=gamma,
    )


def verify_dense(
    rule: Rule, draft: Tensor, draft_probs: Tensor, target_probs: Tensor, transfer_strength: Strength, noise: Noise
) -> Verdict:
    """`verify` of B drafts with p as ``target_probs`` [B, γ+1, V]."""
    return verify(rule, draft_rows(draft, draft_probs), target_probs.flatten(0, 1), transfer_strength, noise)
