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
