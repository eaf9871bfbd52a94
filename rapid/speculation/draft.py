"""Drafts, the limits where they end, and the target's results.

This module does not import torch, since every process of a request reads it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

Pairs = tuple[np.ndarray, np.ndarray]
DraftedToken = tuple[int, Pairs, float]


CONFIDENCES = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)


@dataclass(frozen=True)
class DraftLimits:
    """A draft ends after ``max_tokens``, or when the next token's expected acceptance is below ``floor``.

    ``acceptance`` is the table by confidence that gives the expectation; it is empty for drafts of a fixed length. With
    ``ahead`` the drafter drafts ahead, as if all of the draft were accepted, while the target verifies it.
    """

    max_tokens: int
    floor: float = 0.0
    acceptance: tuple[float, ...] = ()
    ahead: bool = False

    def longer(self, num_tokens: int) -> DraftLimits:
        """The same limits with room for ``num_tokens`` more."""
        return replace(self, max_tokens=self.max_tokens + num_tokens)

    def stop_after(self, confidences: list[float]) -> bool:
        """Whether the draft ends behind the token of the last of ``confidences``."""
        if not self.acceptance:
            return False
        survives = 1.0
        for confidence in confidences:
            survives *= self.acceptance[bisect_right(CONFIDENCES, confidence)]
        return survives < self.floor


@dataclass(frozen=True)
class Draft:
    """γ tokens from output position ``offset`` on, and the truncated q that each was sampled from.

    ``distributions[i]`` is (token ids int32 [k], probabilities float32 [k]) with k ≤ draft_top_k, summing to 1. q has
    no other tokens, so messages carry a few hundred bytes a token and not a whole vocabulary row. ``confidences[i]`` is
    the drafter's probability of the token at temperature 1.
    """

    offset: int
    tokens: list[int] = field(default_factory=list)
    distributions: list[Pairs] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    elapsed_ms: float = 0.0
    step_ms: float = 0.0  # time of one draft step without reading other tokens; 0 if there was none
    num_ahead: int = 0  # how many of the tokens were drafted ahead
    num_sequences: int = 1  # that were in the pass of the last step

    def attributes(self) -> dict[str, Any]:
        return {"rapid.drafted": len(self.tokens), "rapid.drafted_ahead": self.num_ahead}

    def each(self) -> Iterator[DraftedToken]:
        return zip(self.tokens, self.distributions, self.confidences, strict=True)

    def append(self, token: DraftedToken, limits: DraftLimits, eos: frozenset[int]) -> bool:
        """Appends ``token``; returns whether the draft ends with it."""
        for column, value in zip((self.tokens, self.distributions, self.confidences), token, strict=True):
            column.append(value)  # type: ignore[attr-defined]
        return len(self.tokens) == limits.max_tokens or token[0] in eos or limits.stop_after(self.confidences)

    def after(self, offset: int) -> Draft:
        """The part of the draft from output position ``offset`` on."""
        skip = offset - self.offset
        return Draft(offset, self.tokens[skip:], self.distributions[skip:], self.confidences[skip:])

    def before(self, num_tokens: int) -> Draft:
        """The draft's first ``num_tokens`` tokens."""
        columns = self.tokens[:num_tokens], self.distributions[:num_tokens], self.confidences[:num_tokens]
        return replace(self, tokens=columns[0], distributions=columns[1], confidences=columns[2])

    def within(self, limits: DraftLimits, eos: frozenset[int]) -> tuple[Draft, bool]:
        """The beginning of the draft that ``limits`` admit, and whether the draft ends there.

        If it does not end there, more tokens may be drafted behind it.
        """
        draft = Draft(self.offset)
        return draft, limits.max_tokens == 0 or any(draft.append(token, limits, eos) for token in self.each())

    def followed_by(self, ahead: Draft) -> Draft:
        """Both drafts as one; the tokens of ``ahead`` count as drafted ahead."""
        return Draft(
            self.offset,
            self.tokens + ahead.tokens,
            self.distributions + ahead.distributions,
            self.confidences + ahead.confidences,
            num_ahead=len(ahead.tokens),
        )


def certain_draft(offset: int, tokens: list[int]) -> Draft:
    """A draft that was looked up and not sampled: each q is one-hot."""
    one_hot = [(np.array([token], np.int32), np.ones(1, np.float32)) for token in tokens]
    return Draft(offset, tokens, one_hot, [1.0] * len(tokens))


class Logprobs(NamedTuple):
    """Natural log-probabilities: that of a written token, and (token, its own) of the most likely tokens in order."""

    logprob: float
    top: list[tuple[int, float]]


class Trust(NamedTuple):
    """How far the drafter may be followed (`rapid.speculation.trust_region`), both from 0 to 1.

    ``confidence`` is how sure retrieval is of the drafter's passages. ``agreement`` is the running agreement of p and q
    on the output so far; the target's engine gives the next.
    """

    confidence: float = 1.0
    agreement: float = 1.0


NO_DOUBT = Trust()


class Transferred(NamedTuple):
    """A round with η "auto": sums over the ``positions`` that were written with a q, and the ``agreement`` behind them.

    ``strength`` is η, ``divergence`` KL(p̂‖p) and ``bound`` ε, both in nats; ``uncertainty`` is H(p)/(H(p) + H(q)).
    """

    agreement: float
    positions: float
    strength: float
    divergence: float
    bound: float
    uncertainty: float


@dataclass(frozen=True)
class VerifyResult:
    """One round's outcome: ``tokens`` are the accepted tokens and the one token that follows (recovered or bonus).

    ``confidences`` are those of the verified draft tokens. The pass verified ``num_pass_drafted`` draft tokens of
    ``num_sequences``; the draft's last step was shared by ``num_draft_sequences``. ``logprobs`` has one entry for each
    token if the sequence's request has ``num_logprobs``, else it is empty. ``transferred`` is there if η was chosen.
    """

    tokens: list[int]
    num_drafted: int
    num_accepted: int
    num_ahead: int
    confidences: list[float]
    draft_ms: float
    draft_step_ms: float
    verify_ms: float
    num_sequences: int = 1
    num_pass_drafted: int = 0
    num_draft_sequences: int = 1
    logprobs: list[Logprobs] = field(default_factory=list)
    transferred: Transferred | None = None

    def attributes(self) -> dict[str, Any]:
        return {"rapid.drafted": self.num_drafted, "rapid.accepted": self.num_accepted}
