"""Drafts, where they end, and what the target made of them. Free of torch, since every process of a request reads it."""

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
    """Where a draft ends: after ``max_tokens``, or once the next token is expected to stand with less than ``floor``.

    ``acceptance`` is the table by confidence that the expectation is made with; empty for drafts of a fixed length.
    With ``ahead`` the drafter then goes on as if all of the draft were accepted, while the target verifies it.
    """

    max_tokens: int
    floor: float = 0.0
    acceptance: tuple[float, ...] = ()
    ahead: bool = False

    def longer(self, num_tokens: int) -> DraftLimits:
        """The same with room for ``num_tokens`` more."""
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
    """γ tokens from output position ``offset`` on, and the truncated q each was sampled from.

    ``distributions[i]`` is (token ids int32 [k], probabilities float32 [k]) with k ≤ draft_top_k, summing to 1. This is
    all of q that exists, so a few hundred bytes a token travel instead of a whole vocabulary row.
    ``confidences[i]`` is how sure the drafter was of the token (its probability at temperature 1).
    """

    offset: int
    tokens: list[int] = field(default_factory=list)
    distributions: list[Pairs] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    elapsed_ms: float = 0.0
    step_ms: float = 0.0  # of a pass that had nothing else to read; 0 where there was none
    num_ahead: int = 0  # of the tokens, drafted while the target verified those before

    def attributes(self) -> dict[str, Any]:
        return {"rapid.drafted": len(self.tokens), "rapid.drafted_ahead": self.num_ahead}

    def each(self) -> Iterator[DraftedToken]:
        return zip(self.tokens, self.distributions, self.confidences, strict=True)

    def append(self, token: DraftedToken, limits: DraftLimits, eos: frozenset[int]) -> bool:
        """True where the draft ends with it."""
        for column, value in zip((self.tokens, self.distributions, self.confidences), token, strict=True):
            column.append(value)  # type: ignore[attr-defined]
        return len(self.tokens) == limits.max_tokens or token[0] in eos or limits.stop_after(self.confidences)

    def after(self, offset: int) -> Draft:
        """What of it lies at ``offset`` and behind."""
        skip = offset - self.offset
        return Draft(offset, self.tokens[skip:], self.distributions[skip:], self.confidences[skip:])

    def before(self, num_tokens: int) -> Draft:
        """Its first ``num_tokens``."""
        columns = self.tokens[:num_tokens], self.distributions[:num_tokens], self.confidences[:num_tokens]
        return replace(self, tokens=columns[0], distributions=columns[1], confidences=columns[2])

    def within(self, limits: DraftLimits, eos: frozenset[int]) -> tuple[Draft, bool]:
        """Its beginning that ``limits`` admit, and whether the draft ends there; else more may be drafted behind it."""
        draft = Draft(self.offset)
        return draft, limits.max_tokens == 0 or any(draft.append(token, limits, eos) for token in self.each())

    def followed_by(self, ahead: Draft) -> Draft:
        """Both in one, of which ``ahead`` counts as drafted ahead."""
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
    """Natural logarithms: of a written token, and (token, its own) of the most likely ones, the likeliest first."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class VerifyResult:
    """One round's outcome: ``tokens`` are the accepted drafts and the one token that follows them.

    ``confidences`` are those of the draft tokens that were verified. ``logprobs`` has one entry for each token where
    the sequence was opened with ``num_logprobs``, else it is empty.
    """

    tokens: list[int]
    num_drafted: int
    num_accepted: int
    num_ahead: int
    confidences: list[float]
    draft_ms: float
    draft_step_ms: float
    verify_ms: float
    logprobs: list[Logprobs] = field(default_factory=list)

    def attributes(self) -> dict[str, Any]:
        return {"rapid.drafted": self.num_drafted, "rapid.accepted": self.num_accepted}
