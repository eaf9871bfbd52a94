"""The laws of the verification rules, written a second time from the paper's formulas in logits, in float64.

At one position the emitted token follows out = min(q, p̂) + (1 − β)·r with β = Σ min(q, p̂).
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def norm(weights: Array, otherwise: Array) -> Array:
    return weights / weights.sum() if weights.sum() > 0 else otherwise


def augmented(rule: str, z: Array, q: Array, eta: float, temperature: float = 1.0) -> Array:
    """p̂ of one position: ``z`` are the target's logits (−inf outside its support), ``q`` the drafter's distribution."""
    p = softmax(z / temperature)
    if rule == "lossless":
        return p
    if rule == "reference":  # the released code's mask, by the drafter's probability
        return softmax(z / temperature + np.where(q >= 0.1 * q.max(), eta * (q - p), 0.0))
    transferred = softmax(z / temperature + eta * (q - p))  # Eq. 8
    protected = np.where(transferred < 0.1 * transferred.max(), p, transferred)  # Eq. 9
    return protected / protected.sum() if rule == "augmented" else protected


def residual(rule: str, z: Array, q: Array, eta: float, temperature: float = 1.0) -> Array:
    p, p_hat = softmax(z / temperature), augmented(rule, z, q, eta, temperature)
    if rule in ("published", "reference"):  # Eq. 10
        return norm(np.maximum(np.maximum(p - p_hat, p - q), 0.0), otherwise=p)
    return norm(np.maximum(p_hat - q, 0.0), otherwise=p)


def law(rule: str, z: Array, q: Array, eta: float, temperature: float = 1.0) -> Array:
    """The distribution of the emitted token."""
    accepted = np.minimum(q, augmented(rule, z, q, eta, temperature))
    return accepted + (1 - accepted.sum()) * residual(rule, z, q, eta, temperature)


def divergence(probs: Array, p: Array) -> float:
    """KL(probs‖p) in nats; ``probs`` are made to sum to 1."""
    inside = probs > 0
    probs = probs[inside] / probs.sum()
    return float((probs * np.log(probs / p[inside])).sum())


def furthest(rule: str, z: Array, q: Array, eta: float, temperature: float = 1.0) -> float:
    """The larger of KL(p̂‖p) before tail protection and after it."""
    p = softmax(z / temperature)
    before = softmax(z / temperature + eta * (q - p)) if rule != "reference" else p
    return max(divergence(before, p), divergence(augmented(rule, z, q, eta, temperature), p))


def passes(rule: str, z: Array, q: Array, eta: float, temperature: float = 1.0, confidence: float = 1.0) -> float:
    """E_η[d] − E_m[d], where d is what η multiplies, E_η the mean under p·exp(η·d), and m = (1 − c)·p + c·q.

    Above 0 p_η has passed m.
    """
    p = softmax(z / temperature)
    d = q - p
    if rule == "reference":
        d = np.where(q < 0.1 * q.max(), 0.0, d)
    return float(((softmax(z / temperature + eta * d) - (1 - confidence) * p - confidence * q) * d).sum())


def bound(z: Array, q: Array, most: float, temperature: float = 1.0) -> float:
    """ε = ε_max·c·a · H(p)/(H(p) + H(q)), with ``most`` = ε_max·c·a."""
    p_entropy, q_entropy = (
        -float((probs[probs > 0] * np.log(probs[probs > 0])).sum()) for probs in (softmax(z / temperature), q)
    )
    return most * p_entropy / (p_entropy + q_entropy) if p_entropy else 0.0


def chosen_strength(
    rule: str,
    z: Array,
    q: Array,
    epsilon: float,
    temperature: float = 1.0,
    *,
    most: float = 50,
    confidence: float = 1.0,
) -> float:
    """The η that a bisection of 0 to ``most`` ends at, where KL ≤ ``epsilon`` and p̂ has not passed m."""
    low, high = 0.0, most
    while high - low > 1e-9:
        middle = (low + high) / 2
        within = furthest(rule, z, q, middle, temperature) <= epsilon
        if within and passes(rule, z, q, middle, temperature, confidence) <= 0:
            low = middle
        else:
            high = middle
    return low if epsilon > 0 else 0.0
