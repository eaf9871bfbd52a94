"""Verification of a draft: the rules of retrieval-augmented speculative decoding (arXiv 2502.20330), as pure functions.

Notation, kept in the names: ``target_probs`` is p, ``draft_probs`` is q (both after the same warping),
``augmented_probs`` is p̂, ``transfer_strength`` is η. The rules take any leading dimensions; V is the vocabulary.

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
from rapid.sampling.sampler import first_to_come, sample
from rapid.speculation.rows import DraftRows, dense

Strength = float | Tensor  # η, one for all rows or [..., 1]

TAIL = 0.1  # Eq. 9 and the released mask: tokens below this share of the maximum keep their p


def difference(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """q − p, what η multiplies in Eq. 6."""
    return draft_probs - target_probs


def difference_of_likely(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """The released code's mask: q − p for tokens with q ≥ 0.1·max q, and 0 for all others."""
    unlikely = draft_probs < TAIL * draft_probs.amax(-1, keepdim=True)
    return (draft_probs - target_probs).masked_fill_(unlikely, 0.0)


def transferred(target_probs: Tensor, shift: Tensor, transfer_strength: Strength) -> Tensor:
    """softmax(z/T + η·shift), Eq. 6 and 8, from p = softmax(z/T) alone: p·exp(η·shift), normalised.

    Tokens outside the target's own support (top-p, top-k, min-p) stay outside: their p is 0.
    """
    # The largest shift within the support is subtracted first, so that exp cannot overflow for any η.
    inside = (shift * transfer_strength).masked_fill_(target_probs == 0, -torch.inf)
    weights = inside.sub_(inside.amax(-1, keepdim=True)).exp_().mul_(target_probs)
    return _normalised(weights, otherwise=target_probs)


def unprotected(transferred_probs: Tensor, target_probs: Tensor) -> Tensor:
    """The transferred distribution as it is."""
    return transferred_probs


def tail_protected(transferred_probs: Tensor, target_probs: Tensor) -> Tensor:
    """Eq. 9: tokens whose transferred probability is under 0.1 of the maximum keep p. p̂ need not sum to 1."""
    in_tail = transferred_probs < TAIL * transferred_probs.amax(-1, keepdim=True)
    return torch.where(in_tail, target_probs, transferred_probs)


def renormalised(transferred_probs: Tensor, target_probs: Tensor) -> Tensor:
    """Eq. 9, scaled to sum to 1."""
    return _normalised(tail_protected(transferred_probs, target_probs), otherwise=target_probs)


def untouched(transferred_probs: Tensor, target_probs: Tensor) -> Tensor:
    """No transfer: p̂ = p, whatever η is."""
    return target_probs


def residual_eq10(target_probs: Tensor, draft_probs: Tensor, augmented_probs: Tensor) -> Tensor:
    """Eq. 10: r = norm(max(p − p̂, p − q, 0)); r = p if that has no mass."""
    weights = torch.maximum(target_probs - augmented_probs, target_probs - draft_probs).clamp_min(0)
    return _normalised(weights, otherwise=target_probs)


def residual_excess(target_probs: Tensor, draft_probs: Tensor, augmented_probs: Tensor) -> Tensor:
    """r = norm(max(p̂ − q, 0)), which makes the output exactly p̂; r = p if that has no mass."""
    return _normalised((augmented_probs - draft_probs).clamp_min(0), otherwise=target_probs)


def _normalised(weights: Tensor, *, otherwise: Tensor) -> Tensor:
    """Rows scaled to sum to 1; a row without mass becomes its row of ``otherwise``."""
    mass = weights.sum(-1, keepdim=True)
    return torch.where(mass > 0, weights / mass.clamp_min(torch.finfo(mass.dtype).tiny), otherwise)


class Rule(NamedTuple):
    """A verification rule: ``shift`` from (p, q), ``protect`` from (transferred, p), ``residual`` from (p, q, p̂).

    Each gives [..., V] from tensors of that shape. p̂ is the transferred distribution after ``protect``.
    """

    shift: Callable[[Tensor, Tensor], Tensor]
    protect: Callable[[Tensor, Tensor], Tensor]
    residual: Callable[[Tensor, Tensor, Tensor], Tensor]

    def augment(self, target_probs: Tensor, draft_probs: Tensor, transfer_strength: Strength) -> Tensor:
        """p̂ from (p, q, η)."""
        shift = self.shift(target_probs, draft_probs)
        return self.protect(transferred(target_probs, shift, transfer_strength), target_probs)


RULES: dict[str, Rule] = {
    # Eq. 9 and Eq. 10 as printed; p̂ may sum to more than 1. With η > 0 the output is NOT p, although the paper's
    # appendix B says so: it is the law above, shifted towards the drafter. With η = 0 it is p.
    "published": Rule(difference, tail_protected, residual_eq10),
    # The released code's p̂ (the mask, then one softmax over all) with Eq. 10. Output: the law above; p at η = 0.
    "reference": Rule(difference_of_likely, unprotected, residual_eq10),
    # Output: exactly p̂, the renormalised Eq. 9.
    "augmented": Rule(difference, renormalised, residual_excess),
    # Output: exactly p (speculative sampling, arXiv 2211.17192).
    "lossless": Rule(difference, untouched, residual_excess),
}

LOSSLESS = RULES["lossless"]


class Verdict(NamedTuple):
    """``num_accepted`` [B] draft tokens are accepted; ``next_token`` [B] follows them (recovered, or the bonus)."""

    num_accepted: Tensor
    next_token: Tensor


def verify(
    rule: Rule,
    drafts: DraftRows,
    target_probs: Tensor,
    transfer_strength: Strength,
    noise: Noise,
    ids: Tensor | None = None,
) -> Verdict:
    """One round's accept/reject decisions (paper §3.3), for B sequences.

    ``target_probs`` [N + B, V] are the target's rows; ``transfer_strength`` is η, or [N, 1].

    Tokens are accepted up to the first rejection; there the residual distribution gives the recovered token. If all
    tokens of a draft are accepted, the bonus token comes from p of the sequence's last row, because the drafter has no
    q there. A draft without tokens is plain decoding. ``noise`` holds the random numbers of the B requests from their
    first draft token's position on. ``ids`` [V] are the tokens of the columns, if these are only some hundred of the
    vocabulary; the ``drafts`` then name columns.
    """
    num_accepted, next_probs, vocab_size = drafts.lengths, target_probs, target_probs.shape[-1]
    if drafts.longest:
        if rule.protect is untouched:
            augmented_probs, accepting = target_probs, target_probs[drafts.rows, drafts.tokens]
        else:
            draft_probs = dense(drafts.ids, drafts.weights, vocab_size)
            augmented_probs = rule.augment(drafts.scored(target_probs), draft_probs, transfer_strength)
            accepting = augmented_probs.gather(-1, drafts.tokens.unsqueeze(-1)).squeeze(-1)
        keys = noise.keys(Purpose.ACCEPT, torch.arange(drafts.longest, device=accepting.device))  # [B, longest]
        # Strictly below: a token outside the target's support (ratio 0) must never be accepted.
        ratio = accepting / drafts.probs_of_tokens()
        num_accepted = drafts.num_accepted(uniform(keys[drafts.sequences, drafts.steps]) < ratio)

        emitting = drafts.emitting(num_accepted)
        next_probs = target_probs.index_select(0, emitting)
        rejected = (drafts.firsts + num_accepted).clamp_max(len(drafts.tokens) - 1)  # of no meaning if all are accepted
        draft_probs = dense(drafts.ids.index_select(0, rejected), drafts.weights.index_select(0, rejected), vocab_size)
        augmented_probs = next_probs if rule.protect is untouched else augmented_probs.index_select(0, rejected)
        residual = rule.residual(next_probs, draft_probs, augmented_probs)
        next_probs = torch.where((num_accepted == drafts.lengths).unsqueeze(-1), next_probs, residual)
    keys = noise.keys(Purpose.NEXT, num_accepted.unsqueeze(-1)).squeeze(-1)
    if ids is None:
        return Verdict(num_accepted, sample(next_probs, keys))
    return Verdict(num_accepted, ids[first_to_come(next_probs, ids.expand_as(next_probs), keys).squeeze(-1)])


def verify_chosen(drafts: DraftRows, chosen: Tensor) -> Verdict:
    """The verdict where each row has its token ``chosen`` [N + B]: a draft token stands iff it is that of its row.

    `verify` is this at temperature 0 with the argmax of the target's rows, because p and q are one-hot and every rule
    leaves such a p alone. A transfer everywhere chooses by `augmented_logits`.
    """
    if not drafts.longest:
        return Verdict(drafts.lengths, chosen)
    num_accepted = drafts.num_accepted(drafts.scored(chosen) == drafts.tokens)
    return Verdict(num_accepted, chosen[drafts.emitting(num_accepted)])


def augmented_logits(logits: Tensor, target_probs: Tensor, shift: Tensor, transfer_strength: Strength) -> Tensor:
    """z/T + η·shift (Eq. 6) of each row, [..., V].

    ``logits`` are z/T, of which ``target_probs`` are p. Tokens outside the target's own support stay outside.
    """
    return (logits + shift * transfer_strength).masked_fill_(target_probs == 0, -torch.inf)


def output_law(rule: Rule, draft_probs: Tensor, target_probs: Tensor, transfer_strength: Strength) -> Tensor:
    """The law of the tokens that `verify` emits for one draft, [γ+1, V]: ``out`` above, and p for the bonus token.

    ``draft_probs`` [γ, V], ``target_probs`` [γ+1, V]. Row i is the law of the token at position i, given that all
    tokens before it are the draft's.
    """
    gamma = draft_probs.shape[-2]
    scored, bonus = target_probs[..., :gamma, :], target_probs[..., gamma:, :]
    augmented_probs = rule.augment(scored, draft_probs, transfer_strength)
    accepted = torch.minimum(draft_probs, augmented_probs)
    rejected = (1 - accepted.sum(-1, keepdim=True)).clamp_min(0)
    residual = rule.residual(scored, draft_probs, augmented_probs)
    return torch.cat([accepted + rejected * residual, bonus], -2)
