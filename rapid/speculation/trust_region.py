"""η as a trust region (`transfer_strength` "auto"): the strongest transfer within ε nats of p, as far as q is trusted.

p_η ∝ p·exp(η·d), with d the rule's shift (q − p), is an exponential family: d KL(p_η‖p)/dη = η·Var_η(d) ≥ 0, and
d E_η[d]/dη = Var_η(d) ≥ 0. So the largest η with KL(p_η‖p) ≤ ε and E_η[d] ≤ E_m[d] is found by bisection, where
m = (1 − c)·p + c·q is what is likely if the passages are the right ones with probability c, the confidence of
retrieval, and else say nothing. Where E_η[d] = E_m[d], p_η is the one of the family that is nearest to m, in
KL(m‖p_η). Beyond q, a token that both hold likely, and p more so, would lose to tokens that neither does. What tail
protection makes of p_η is held to ε too. The bound is

    ε = ε_max · c · g · a,   g = H(p) / (H(p) + H(q))

with g the share of the target's own uncertainty, and a the running agreement of p and q (Σ min(p, q)) on the output so
far. All of it depends on the prefix and on (p, q) alone, never on the drafted token or
the clock. So each position has one η, and a rule's output law holds with it. Related: arXiv 2408.01084, 2409.07394,
2508.17670.

These are functions of tensors on the device with static shapes; nothing is read on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rapid.kernels.transfer import upload
from rapid.speculation.verification import TAIL, Rule, unprotected

MAX_STRENGTH = 50.0  # the paper's largest η
MEMORY = 0.9  # of the running agreement, per position

_STEPS = 20  # of the bisection: η to 5e-5
_TOP = 512  # tokens that the bisection looks at one by one; the others enter by three terms of exp's series


class Region(NamedTuple):
    """The choice for N positions: η as ``strength``, KL(p̂‖p), and its ``bound`` ε with g as ``uncertainty``; [N, 1]."""

    strength: Tensor
    divergence: Tensor
    bound: Tensor
    uncertainty: Tensor


def choose(rule: Rule, target_probs: Tensor, draft_probs: Tensor, most: Tensor, confidence: Tensor) -> Region:
    """The region of each row of p and q [N, V] with ε = ``most``·g; ``most`` is ε_max·c·a, ``confidence`` c: [N, 1]."""
    target_entropy, draft_entropy = (
        torch.special.entr(probs).sum(-1, keepdim=True, dtype=torch.float64) for probs in (target_probs, draft_probs)
    )
    both = target_entropy + draft_entropy
    uncertainty = torch.where(both > 0, target_entropy / both.clamp_min(torch.finfo(both.dtype).tiny), 0)
    bound = most * uncertainty
    strength, divergence = strongest(rule, target_probs, draft_probs, bound, confidence)
    return Region(strength, divergence, bound, uncertainty)


def strongest(
    rule: Rule, target_probs: Tensor, draft_probs: Tensor, bound: Tensor, confidence: Tensor
) -> tuple[Tensor, Tensor]:
    """(the largest η up to `MAX_STRENGTH` with divergence ≤ ``bound`` before m, that divergence), float64 [N, 1]."""
    family = _Family.of(rule, target_probs, draft_probs)
    shift = rule.shift(target_probs, draft_probs)
    of_target, of_draft = (
        (each * shift).sum(-1, keepdim=True, dtype=torch.float64) for each in (target_probs, draft_probs)
    )
    goal = of_target + confidence * (of_draft - of_target)
    low = torch.zeros_like(bound)
    high = low + MAX_STRENGTH
    for _ in range(_STEPS):
        middle = (low + high) / 2
        divergence, mean_shift = family.at(middle)
        fits = (divergence <= bound) & (mean_shift <= goal)
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    low = torch.where(bound > 0, low, 0)
    return low, family.at(low)[0].clamp_min(0)


class _Family(NamedTuple):
    """p_η of N rows: p and d of the tokens that matter [N, k], and of all others Σp, Σpd and Σpd² [N, 1]."""

    probs: Tensor
    shift: Tensor
    others: tuple[Tensor, Tensor, Tensor]
    is_protected: bool

    @classmethod
    def of(cls, rule: Rule, target_probs: Tensor, draft_probs: Tensor) -> _Family:
        shift = rule.shift(target_probs, draft_probs)
        _, ids = (target_probs + draft_probs).topk(min(_TOP, target_probs.shape[-1]), sorted=False)
        probs = target_probs.gather(-1, ids).double()
        left = target_probs.scatter(-1, ids, 0.0)
        others = [(left * factor).sum(-1, keepdim=True, dtype=torch.float64) for factor in (1, shift, shift * shift)]
        mass = probs.sum(-1, keepdim=True) + others[0]  # 1, but for rounding
        moments = others[0] / mass, others[1] / mass, others[2] / mass
        is_protected = rule.protect is not unprotected
        return cls(probs / mass, shift.gather(-1, ids).double(), moments, is_protected)

    def at(self, strength: Tensor) -> tuple[Tensor, Tensor]:
        """For η [N, 1]: KL(p_η‖p), or KL(p̂‖p) where that is larger, and E_η[d]; [N, 1] each."""
        mass, mean, square = self.others
        exponent = self.shift * strength
        weights = self.probs * exponent.exp()
        total = weights.sum(-1, keepdim=True) + mass + strength * mean + strength**2 * square / 2
        mean_shift = ((weights * self.shift).sum(-1, keepdim=True) + mean + strength * square) / total
        transferred = strength * mean_shift - total.log()
        if not self.is_protected:
            return transferred, mean_shift
        # Eq. 9, made to sum to 1. The others count as protected.
        in_tail = weights < TAIL * weights.amax(-1, keepdim=True)
        kept = torch.where(in_tail, self.probs, weights / total)
        ratio = torch.where(in_tail, 0, exponent - total.log())
        scale = kept.sum(-1, keepdim=True) + mass
        protected = (kept * ratio).sum(-1, keepdim=True) / scale - scale.log()
        return torch.maximum(transferred, protected), mean_shift


def running_agreement(before: Tensor, agreements: Tensor) -> Tensor:
    """The running agreement at each position of B rounds, and behind the last.

    ``before`` [B] is the agreement where the rounds begin, ``agreements`` [B, L] is Σ min(p, q) of each of their
    positions; [B, L + 1].
    """
    behind = np.arange(agreements.shape[-1] + 1)
    ages = behind[:, None] - 1 - behind[:-1]
    weights = np.where(ages >= 0, (1 - MEMORY) * MEMORY ** np.maximum(ages, 0), 0)
    decay = upload(MEMORY**behind, "float64", before.device)
    return before.unsqueeze(-1) * decay + agreements @ upload(weights.T, "float64", before.device)
