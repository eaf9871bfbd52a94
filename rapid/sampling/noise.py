"""Random numbers that are a function of (seed, output position, purpose, token), and of nothing else.

A generator with a state gives each draw the next number, so a text depends on everything that was drawn before. These
numbers have no state: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) hashes a counter, on every device alike. So a
request's text does not depend on the other requests of its batch, on the engine's history, or on the engine itself.

No number serves two draws, so the output's law is that of independent numbers. A position of the output is written
once, so one number for its accept test and one key for its recovered or bonus token are enough: a test behind the first
rejection is not looked at. A transfer everywhere draws each token with that key. But a position may be drafted in
several rounds. A draft behind a rejected token is discarded, and how long it was may have had a say in the length of
later drafts. So a draft's numbers go by the position where its round begins, too, and tokens drafted ahead continue
them. Every round writes a token, so no two rounds begin at the same position. After a failure an engine repeats a round
with the same numbers, and nothing has seen them yet.
"""

from __future__ import annotations

from enum import IntEnum

from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as int64, like the two factors of SplitMix64
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


class Purpose(IntEnum):
    """What a number decides: a draft token, a draft token's acceptance, or the token behind the accepted ones."""

    DRAFT = 0
    ACCEPT = 1
    NEXT = 2


class Noise:
    """The random numbers of requests with ``seeds`` [...] (int64), from output position ``start`` on.

    ``start`` is one position for all requests, or one for each (int64 [...]).
    """

    def __init__(self, seeds: Tensor, start: int | Tensor = 0) -> None:
        self._hashed = _mix(seeds)
        self._start = start.unsqueeze(-1) if isinstance(start, Tensor) else start

    def keys(self, purpose: Purpose, steps: Tensor) -> Tensor:
        """One key for each of ``steps`` (int64 [..., n], positions counted from ``start``): [..., n].

        The keys of `Purpose.DRAFT` also depend on ``start``, where the round begins.
        """
        round_start = self._start if purpose is Purpose.DRAFT else 0
        # Positions are below 2^31, so position, round and purpose have bits of their own.
        counter = (self._start << 32) + (round_start << 2) + purpose
        return _mix(((steps << 32) + counter) * GOLDEN + self._hashed.unsqueeze(-1))


def uniform(keys: Tensor) -> Tensor:
    """One number for each key, in the open interval (0, 1), with 52 bits: float64, the shape of ``keys``."""
    return _open_interval(_mix(keys + GOLDEN))


def exponential(keys: Tensor, ids: Tensor) -> Tensor:
    """One exponential variable of mean 1 for each key [...] and id [..., k] (at least 0): float64 [..., k].

    They decide a draw: the item of the largest weight_i / E_i wins. So P(i) = weight_i / Σ weights, an item of weight 0
    never wins if there is another, and a change of the weights changes the draw only if it changes which item is first.
    """
    return _open_interval(_mix((ids + 1) * GOLDEN + keys.unsqueeze(-1))).log_().neg_()


def _open_interval(hashed: Tensor) -> Tensor:
    return ((hashed >> 12) & (2**52 - 1)).double().add_(0.5).mul_(2.0**-52)


def _mix(counter: Tensor) -> Tensor:
    """SplitMix64's finalizer, a bijection of 64 bits; the arithmetic of int64 wraps around."""
    mixed = counter ^ ((counter >> 30) & (2**34 - 1))
    mixed.mul_(FIRST)
    mixed ^= (mixed >> 27) & (2**37 - 1)
    mixed.mul_(SECOND)
    mixed ^= (mixed >> 31) & (2**33 - 1)
    return mixed
