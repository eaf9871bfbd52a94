"""Drafts of several tokens, each a single replayed graph: passes, and between them the drawing of the next token.

Nothing of it comes back to the host until the draft is read: lengths, positions, slots, parameters and random numbers
are on the device. So a draft is one launch for the host, where it was one for each pass and dozens for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rapid.engine.readout import Drawing, Drawn, draft_keys, drawn_values
from rapid.kernels.interface import BatchEntry
from rapid.kernels.transfer import upload
from rapid.models.draft_head import DraftHead
from rapid.models.recorded_cuda import MAX_PENDING, GraphRunner, Steps
from rapid.sampling.row_params import RowParams, truncates
from rapid.speculation.drawing import draw_in_graph

NUM_SEQUENCES = (1, 2, 4, 8)
NUM_STEPS = (8, 4, 2)  # a draft of another length is several of them; a single step is an ordinary pass
MOST_TOP_K = 64  # of q's tokens; drafts with more are drawn step by step


class _Kind(NamedTuple):
    """What a graph holds. Without ``truncates`` no sequence has top-k, top-p or min-p, and nothing is sorted."""

    shape: Steps
    truncates: bool


class DraftGraphs:
    """Recorded drafts over the pool of ``runner``, within its limits; ``vocab_size`` is the model's."""

    def __init__(self, runner: GraphRunner, vocab_size: int, device: torch.device) -> None:
        self._runner, self._vocab_size, self._device = runner, vocab_size, device
        most, self._width = NUM_SEQUENCES[-1], min(MOST_TOP_K, vocab_size)
        self._columns = torch.zeros(most, 4, dtype=torch.float64, device=device)  # as in `RowParams`
        self._places = torch.zeros(most, 4, dtype=torch.long, device=device)  # as in `draft_keys`, and draft_top_k
        size = (NUM_STEPS[0], most, 2 + 2 * self._width)
        self._values = torch.zeros(size, dtype=torch.float64, device=device)
        kinds = [
            _Kind(Steps(sequences, steps), truncating)
            for sequences in NUM_SEQUENCES
            for truncating in (False, True)
            for steps in NUM_STEPS
        ]
        self._replays = runner.record(kinds, lambda kind: runner.steps(kind.shape, partial(self._choose, kind)))

    def __len__(self) -> int:
        return len(self._replays)

    def run(
        self,
        entries: Sequence[BatchEntry],
        heads: Sequence[DraftHead | None],
        drawings: Sequence[Drawing],
        abandoned: Callable[[], bool],
    ) -> tuple[list[Drawn], int] | None:
        """As many tokens as a graph draws for each of ``entries``, and the number of passes; None without a graph.

        The caches have all but the last of the tokens afterwards.
        """
        kind = None if any(heads) else self._kind(entries, drawings)
        if kind is None:
            return None
        n, steps = len(entries), kind.shape.steps
        places = [(each.seed, each.round_start, each.step, each.draft_top_k) for each in drawings]
        self._places[:n] = upload(places, "int64", self._device)
        self._columns[:n] = RowParams.of([each.sampling for each in drawings], self._device).columns
        self._runner.replay(self._replays[kind], entries, kind.shape.first, more=steps - 1)
        for cache, tokens, _ in entries:
            cache.advance(len(tokens) + steps - 1)
        values = self._values[:steps, :n].clone()  # the next draft overwrites them
        return [self._drawn(values[:, i], drawing) for i, drawing in enumerate(drawings)], steps

    def _kind(self, entries: Sequence[BatchEntry], drawings: Sequence[Drawing]) -> _Kind | None:
        sequences = next((n for n in NUM_SEQUENCES if n >= len(entries)), None)
        most = min(drawing.num_tokens for drawing in drawings)
        counts = [len(tokens) for _, tokens, _ in entries]
        if sequences is None or max(counts) > MAX_PENDING:
            return None
        if any(
            each.following is not None
            or (each.sampling.temperature > 0 and (each.is_greedy or each.draft_top_k > MOST_TOP_K))
            for each in drawings
        ):
            return None
        truncating = any(truncates(each.sampling, self._vocab_size) for each in drawings)
        for steps in NUM_STEPS:
            kind = _Kind(Steps(sequences, steps), truncating)
            fits = sum(counts) <= kind.shape.first.rows and self._runner.has_room(entries, steps - 1)
            if steps <= most and fits and kind in self._replays:
                return kind
        return None

    def _choose(self, kind: _Kind, step: int, logits: Tensor) -> Tensor:
        n = kind.shape.sequences
        drawn = draw_in_graph(
            logits[:, : self._vocab_size].float(),
            self._columns[:n],
            self._places[:n, 3],
            draft_keys(self._places[:n], step),
            most=MOST_TOP_K,
            truncates=kind.truncates,
        )
        self._values[step, :n] = drawn_values(drawn)
        return drawn.tokens

    def _drawn(self, values: Tensor, drawing: Drawing) -> Drawn:
        """``values`` [steps, n] as they would be if each token had been drawn by itself."""
        last = values[-1, :1].long()
        if drawing.sampling.temperature == 0:
            return Drawn(last, values[:, :2])
        k = min(drawing.draft_top_k, self._width)
        if k < self._width:
            values = torch.cat((values[:, : 2 + k], values[:, 2 + self._width : 2 + self._width + k]), 1)
        return Drawn(last, values)
