"""How many prompt tokens a pass reads: all that is allowed, or what a step's time allows while others decode.

A pass is taken to cost some milliseconds for what decodes, and some for each unit of prefill work. A token's work is 1
for its products, and 1 for its attention over ``balanced_context`` tokens. Both costs are learned from measured passes,
so they hold for any device and model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

# By device. On a CPU larger passes read no faster. On a GPU a pass reads all weights, so that many tokens share that.
MAX_BATCH_TOKENS = {"cpu": 128, "cuda": 8192}
STEP_BUDGET_MS = 100.0

_FIRST_TOKENS = 128  # of a prefill in a pass, before any was measured
_LEAST_TOKENS = 16
_LEAST_SHARE = 0.25  # of a pass's time, for prefills, even if decoding takes all of the budget: prompts must be read
_NEWEST = 0.5  # the weight of the newest measurement


class Chunk(NamedTuple):
    """``num_tokens`` of a prompt, read behind ``context`` others."""

    num_tokens: int
    context: int


class Pacer:
    """Passes have at most ``max_tokens`` tokens, and take about ``step_budget_ms`` while sequences decode."""

    def __init__(self, max_tokens: int, step_budget_ms: float, balanced_context: float) -> None:
        self.max_tokens = max_tokens
        self._budget_ms, self._balanced_context = step_budget_ms, balanced_context
        self._base_ms = 0.0
        self._ms_per_work: float | None = None

    def num_tokens(self, num_decoding: int, contexts: Iterable[int], *, streaming: bool) -> int:
        """The tokens of the next pass: ``num_decoding`` of them decode, the rest read prompts behind ``contexts``.

        With ``streaming`` other sequences decode, in this pass or soon, and wait for its end.
        """
        context = max(contexts, default=None)
        if context is None or not streaming:
            return self.max_tokens
        return min(self.max_tokens, num_decoding + self._affordable(context))

    def observe(self, ms: float, chunks: list[Chunk]) -> None:
        """Learns from a pass that took ``ms`` and read ``chunks``."""
        if not chunks:
            self._base_ms += _NEWEST * (ms - self._base_ms) if self._base_ms else ms
            return
        measured = max(ms - self._base_ms, _LEAST_SHARE * ms) / self._work(chunks)
        known = measured if self._ms_per_work is None else self._ms_per_work
        self._ms_per_work = known + _NEWEST * (measured - known)

    def expected_s(self, chunks: list[Chunk], decoding: list[Chunk]) -> float | None:
        """How long a pass takes that reads ``chunks`` and in which the tokens ``decoding`` decode; None: unknown yet.

        A token that decodes counts as one that is read, beside what a pass costs with any: with longer contexts than
        those that were measured it may take longer.
        """
        is_known = self._ms_per_work is not None if chunks else self._base_ms > 0
        if not is_known:
            return None
        return (self._base_ms + (self._ms_per_work or 0.0) * self._work([*chunks, *decoding])) / 1e3

    def _work(self, chunks: list[Chunk]) -> float:
        return sum(n * (1 + (context + n / 2) / self._balanced_context) for n, context in chunks)

    def too_large(self, num_tokens: int) -> None:
        """There was no memory for a pass of ``num_tokens``: later ones have at most half as many."""
        self.max_tokens = max(1, min(self.max_tokens, num_tokens // 2))

    def _affordable(self, context: int) -> int:
        """The most tokens behind ``context`` whose work fits into what is left of the budget."""
        if not self._ms_per_work:
            return _FIRST_TOKENS
        left_ms = max(self._budget_ms - self._base_ms, _LEAST_SHARE * self._budget_ms)
        # The work of n tokens is n · (1 + (context + n / 2) / balanced): a quadratic equation in n.
        each, scale = 1 + context / self._balanced_context, self._balanced_context
        n = scale * (math.sqrt(each**2 + 2 * left_ms / self._ms_per_work / scale) - each)
        return max(_LEAST_TOKENS, int(n))
