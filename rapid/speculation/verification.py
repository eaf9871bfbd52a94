"""Verification of a draft: the rules of retrieval-augmented speculative decoding (arXiv 2502.20330), as pure functions.

Notation, kept in the names: ``target_probs`` is p, ``draft_probs`` is q (both after the same warping),
``augmented_probs`` is p̂, ``transfer_strength`` is η. All take any leading dimensions; V is the vocabulary.

At one position, every rule accepts the draft token x with probability min(1, p̂(x)/q(x)); otherwise it samples the
recovered token from its residual distribution r. Since x was drawn from q, the emitted token follows

    out = min(q, p̂) + (1 − β)·r,   β = Σ min(q, p̂)

Each rule below states which law this gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rapid.sampling.noise import Noise, Purpose, uniform
from rapid.sampling.sampler import sample

TAIL = 0.1  # Eq. 9 and the released mask: tokens below this share of the maximum keep their p


def transfer(target_probs: Tensor, draft_probs: Tensor, transfer_strength: float) -> Tensor:
    """softmax(z/T + η(q − p)), Eq. 6 and 8, from p = softmax(z/T) alone: p·exp(η(q − p)), normalised.

    Tokens outside the target's own support (top-p, top-k, min-p) stay outside: their p is 0.
    """
    return _shifted(target_probs, transfer_strength * (draft_probs - target_probs))


def tail_protected(target_probs: Tensor, draft_probs: Tensor, transfer_strength: float) -> Tensor:
    """Eq. 9: tokens whose transferred probability is under 0.1 of the maximum keep p. p̂ need not sum to 1."""
    transferred = transfer(target_probs, draft_probs, transfer_strength)
    return torch.where(transferred < TAIL * transferred.amax(-1, keepdim=True), target_probs, transferred)


def drafter_masked(target_probs: Tensor, draft_probs: Tensor, transfer_strength: float) -> Tensor:
    """The released code's p̂: moves only the logits of tokens with q ≥ 0.1·max q, then takes one softmax over all."""
    shift = transfer_strength * (draft_probs - target_probs)
    unlikely = draft_probs < TAIL * draft_probs.amax(-1, keepdim=True)
    return _shifted(target_probs, shift.masked_fill(unlikely, 0.0))


def renormalised(target_probs: Tensor, draft_probs: Tensor, transfer_strength: float) -> Tensor:
    """Eq. 9, scaled to sum to 1."""
    return _normalised(tail_protected(target_probs, draft_probs, transfer_strength), otherwise=target_probs)


def untouched(target_probs: Tensor, draft_probs: Tensor, transfer_strength: float) -> Tensor:
    """No transfer: p̂ = p, whatever η is."""
    return target_probs


def residual_eq10(target_probs: Tensor, draft_probs: Tensor, augmented_probs: Tensor) -> Tensor:
    """Eq. 10: r = norm(max(p − p̂, p − q, 0)); r = p if that has no mass."""
    weights = torch.maximum(target_probs - augmented_probs, target_probs - draft_probs).clamp_min(0)
    return _normalised(weights, otherwise=target_probs)


def residual_excess(target_probs: Tensor, draft_probs: Tensor, augmented_probs: Tensor) -> Tensor:
    """r = norm(max(p̂ − q, 0)), which makes the output exactly p̂; r = p if that has no mass."""
    return _normalised((augmented_probs - draft_probs).clamp_min(0), otherwise=target_probs)


def _shifted(probs: Tensor, shift: Tensor) -> Tensor:
    # The largest shift within the support is subtracted first, so that exp cannot overflow for any η.
    inside = shift.masked_fill(probs == 0, -torch.inf)
    return _normalised(probs * (inside - inside.amax(-1, keepdim=True)).exp(), otherwise=probs)


def _normalised(weights: Tensor, *, otherwise: Tensor) -> Tensor:
    """Rows scaled to sum to 1; a row without mass becomes its row of ``otherwise``."""
    mass = weights.sum(-1, keepdim=True)
    return torch.where(mass > 0, weights / mass.clamp_min(torch.finfo(mass.dtype).tiny), otherwise)


class Rule(NamedTuple):
    """A verification rule: p̂ from (p, q, η), and r from (p, q, p̂); each [..., V] to [..., V]."""

    augment: Callable[[Tensor, Tensor, float], Tensor]
    residual: Callable[[Tensor, Tensor, Tensor], Tensor]


RULES: dict[str, Rule] = {
    # Eq. 9 and Eq. 10 as printed; p̂ may sum to more than 1. With η > 0 the output is NOT p, although the paper's
    # appendix B says so: it is the law above, shifted towards the drafter. With η = 0 it is p.
    "published": Rule(tail_protected, residual_eq10),
    # The released code's p̂ with Eq. 10. Output: the law above; p at η = 0.
    "reference": Rule(drafter_masked, residual_eq10),
    # Output: exactly p̂, the renormalised Eq. 9.
    "augmented": Rule(renormalised, residual_excess),
    # Output: exactly p (speculative sampling, arXiv 2211.17192).
    "lossless": Rule(untouched, residual_excess),
}

LOSSLESS = RULES["lossless"]


class Verdict(NamedTuple):
    """``num_accepted`` [...] draft tokens are accepted; ``next_token`` [...] follows them (recovered, or the bonus)."""

    num_accepted: Tensor
    next_token: Tensor


def verify(
    rule: Rule,
    draft_tokens: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    transfer_strength: float,
    noise: Noise,
) -> Verdict:
    """One round's accept/reject decisions (paper §3.3).

    ``draft_tokens`` [..., γ] were sampled from ``draft_probs`` [..., γ, V]; ``target_probs`` [..., γ+1, V] are the
    target's rows at the same positions and one more. Tokens are accepted up to the first rejection; there the residual
    distribution gives the recovered token. If all γ tokens are accepted, the bonus token comes from p of row γ+1,
    because the drafter has no q there. γ = 0 is plain decoding. ``noise`` holds the random numbers of these rows from
    the first draft token's position on; its seeds are [...], like the leading dimensions.
    """
    gamma = draft_tokens.shape[-1]
    scored = target_probs[..., :gamma, :]
    augmented_probs = rule.augment(scored, draft_probs, transfer_strength)

    drafted = draft_tokens.unsqueeze(-1)
    ratio = (augmented_probs.gather(-1, drafted) / draft_probs.gather(-1, drafted)).squeeze(-1)
    steps = torch.arange(gamma, device=ratio.device)
    # Strictly below: a token outside the target's support (ratio 0) must never be accepted.
    num_accepted = (uniform(noise.keys(Purpose.ACCEPT, steps)) < ratio).long().cumprod(-1).sum(-1)

    next_probs = _row(target_probs, num_accepted)
    if gamma:
        rejected = num_accepted.clamp_max(gamma - 1)
        residual = rule.residual(_row(scored, rejected), _row(draft_probs, rejected), _row(augmented_probs, rejected))
        next_probs = torch.where((num_accepted == gamma).unsqueeze(-1), next_probs, residual)
    return Verdict(num_accepted, sample(next_probs, noise.keys(Purpose.NEXT, num_accepted.unsqueeze(-1)).squeeze(-1)))


def output_law(rule: Rule, draft_probs: Tensor, target_probs: Tensor, transfer_strength: float) -> Tensor:
    """The law of the tokens that `verify` emits, [..., γ+1, V]: ``out`` above, and p for the bonus token.

    Row i is the law of the token at position i, given that all tokens before it are the draft's.
    """
    gamma = draft_probs.shape[-2]
    scored, bonus = target_probs[..., :gamma, :], target_probs[..., gamma:, :]
    augmented_probs = rule.augment(scored, draft_probs, transfer_strength)
    accepted = torch.minimum(draft_probs, augmented_probs)
    rejected = (1 - accepted.sum(-1, keepdim=True)).clamp_min(0)
    residual = rule.residual(scored, draft_probs, augmented_probs)
    return torch.cat([accepted + rejected * residual, bonus], -2)


def verify_greedy(draft_tokens: Tensor, logits: Tensor) -> Verdict:
    """`verify` at temperature 0, where p and q are one-hot: every rule accepts a draft token iff it is the argmax.

    ``draft_tokens`` [γ], ``logits`` [γ+1, V].
    """
    best = logits.argmax(-1)
    num_accepted = (best[:-1] == draft_tokens).long().cumprod(-1).sum(-1)
    return Verdict(num_accepted, best[num_accepted])


def _row(rows: Tensor, index: Tensor) -> Tensor:
    """Row ``index`` [...] of each matrix of ``rows`` [..., n, V]: [..., V]."""
    return rows.gather(-2, index[..., None, None].expand(*index.shape, 1, rows.shape[-1])).squeeze(-2)
