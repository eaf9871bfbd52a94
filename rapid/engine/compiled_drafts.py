"""Drafts of one sequence on a CPU: a few passes in one turn, each with its token drawn in few calls from Python."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rapid.engine.readout import Drawing, Drawn, draft_keys
from rapid.kernels.cpu.ir_builder import LANES
from rapid.kernels.cpu.jit import Kernel
from rapid.kernels.interface import BatchEntry
from rapid.models.compiled_steps import CompiledSteps
from rapid.models.draft_head import DraftHead
from rapid.sampling import noise, truncation_ir
from rapid.sampling.logits_processor import Following
from rapid.sampling.truncation_ir import MOST
from rapid.speculation import drawing_ir
from rapid.speculation.drawing_ir import write_drawing


class CompiledDrafts:
    """Draws what `rapid.engine.readout` would, by ``steps`` of a model with ``vocab_size`` tokens."""

    def __init__(self, steps: CompiledSteps, vocab_size: int) -> None:
        self._steps, self._all_ids = steps, torch.arange(vocab_size)
        _kernel()  # compiled now, and not during a request

    def run(
        self,
        entries: Sequence[BatchEntry],
        heads: Sequence[DraftHead | None],
        drawings: Sequence[Drawing],
        abandoned: Callable[[], bool],
    ) -> tuple[list[Drawn], int] | None:
        """The tokens of each entry, and the number of passes; None if there are several entries, or no kernel for one.

        Raises:
            PassAbandoned: ``abandoned`` returned True before a pass; no cache is longer.
        """
        (cache, feed, _), (own,), (drawing,) = entries[0], heads[:1], drawings[:1]
        head, ids = self._steps.head(own), self._all_ids if own is None else own.ids
        room = cache.capacity - cache.length - len(feed) + 1
        if (
            len(entries) > 1
            or not self._steps.supports(cache, feed, head)
            or not TokenDrawer.supports(drawing, len(ids))
        ):
            return None
        drawer = TokenDrawer(drawing, ids, min(drawing.num_tokens, room))
        num_passes = self._steps.run(cache, feed, head, drawer, drawer.num_steps, abandoned)
        cache.advance(len(feed) + num_passes - 1)
        return [drawer.tokens_of(num_passes)], num_passes


class TokenDrawer:
    """Draws up to ``num_steps`` tokens for one ``drawing``; ``ids`` [N] are those of the columns."""

    def __init__(self, drawing: Drawing, ids: Tensor, num_steps: int) -> None:
        sampling, width = drawing.sampling, len(ids)
        self.kernel, self.num_steps = _kernel(), num_steps
        self._drawing, self._is_greedy = drawing, sampling.temperature == 0
        k = 1 if self._is_greedy else min(drawing.draft_top_k, width)
        warping = (1.0, 1.0, 0.0) if self._is_greedy else (sampling.temperature, sampling.top_p, sampling.min_p)
        columns, penalties = _adjustment(drawing.following, width)
        places = [(drawing.seed, drawing.round_start, drawing.step + i) for i in range(num_steps)]
        self._keys: list[int] = draft_keys(torch.tensor(places)).tolist()
        self._tokens = np.zeros(num_steps, np.int64)
        self._values = np.zeros((num_steps, 2 + 2 * k))
        numbers, scratch = np.array([*warping, *penalties]), torch.empty(width)
        self._memory = columns, ids, numbers, scratch  # what the kernel has the addresses of
        self._row = width, *(column.data_ptr() for column in columns), ids.data_ptr()
        self._how = numbers.ctypes.data, 0 if self._is_greedy else sampling.top_k, k
        self._likeliest = int(self._is_greedy or drawing.is_greedy)
        self._places = self._tokens.ctypes.data, self._values.ctypes.data, scratch.data_ptr()

    @staticmethod
    def supports(drawing: Drawing, width: int) -> bool:
        """Whether the kernel draws so from rows of that ``width``."""
        may_end = drawing.following is None or drawing.following.may_end  # and then always
        few = drawing.sampling.temperature == 0 or min(drawing.draft_top_k, width) <= MOST
        return may_end and few and width % LANES == 0

    def arguments(self, step: int, logits: Tensor) -> tuple[int, ...]:
        tokens, values, scratch = self._places
        results = tokens + step * self._tokens.itemsize, values + step * self._values.strides[0], scratch
        return (logits.data_ptr(), *self._row, *self._how, self._keys[step], self._likeliest, *results)

    def drawn(self, step: int) -> Tensor | None:
        token, confidence = self._tokens[step : step + 1], float(self._values[step, 1])
        goes_on = step + 1 < self.num_steps and self._drawing.goes_on(int(token[0]), confidence)
        return torch.from_numpy(token) if goes_on else None

    def tokens_of(self, num_steps: int) -> Drawn:
        """What was drawn in so many steps."""
        values = self._values[:num_steps, :2] if self._is_greedy else self._values[:num_steps]
        return Drawn(torch.from_numpy(self._tokens[num_steps - 1 : num_steps]), torch.from_numpy(values))


def _adjustment(following: Following | None, width: int) -> tuple[tuple[Tensor, ...], tuple[float, float, float]]:
    """What the kernel has to know of ``width`` columns, and the penalties of repetition, frequency and presence."""
    if following is None:
        bias, lowered = torch.zeros(2, width).unbind()
        in_text, is_written = torch.zeros(2, width, dtype=torch.bool).unbind()
        return (bias, in_text, lowered, is_written), (1.0, 0.0, 0.0)
    asked = following.params
    columns = following.bias(), following.in_text, following.lowered, following.is_written
    return columns, (asked.repetition_penalty, asked.frequency_penalty, asked.presence_penalty)


@functools.cache
def _kernel() -> Kernel:
    return Kernel("drawing", write_drawing, drawing_ir.__file__, noise.__file__, truncation_ir.__file__)
