"""Passes of a shape that repeats (a draft step, a decode step, a verification), replayed as CUDA graphs.

A graph is captured for each number of sequences, of new tokens in each, and of pages. The first and the last are
rounded up to a power of two; dummy sequences on the pool's spare page fill the rest. On a CPU, where the tests run this
module, the same static buffers are filled and the pass is called directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rapid.kernels.cuda.attention import FEW_TOKENS, PagedAttention, PagedBatch
from rapid.kernels.interface import BatchEntry
from rapid.models.llama import Decoder

MAX_NEW_TOKENS = FEW_TOKENS  # of one sequence
MAX_SEQUENCES = 32


@dataclass
class _Captured:
    tokens: Tensor
    positions: Tensor
    rows: Tensor
    batch: PagedBatch
    logits: Tensor
    graph: torch.cuda.CUDAGraph | None


class GraphRunner:
    """Captures a graph at the first pass of its shape, and keeps it."""

    def __init__(self, decoder: Decoder, kernel: PagedAttention, device: torch.device) -> None:
        self._decoder, self._kernel, self._device = decoder, kernel, device
        self._captured: dict[tuple[int, int, int, int], _Captured] = {}

    def supports(self, entries: Sequence[BatchEntry]) -> bool:
        """Whether a pass of this shape is worth capturing: a few tokens, equally many for each sequence."""
        lengths = {len(tokens) for _, tokens, _ in entries}
        return len(lengths) == 1 and max(lengths) <= MAX_NEW_TOKENS and len(entries) <= MAX_SEQUENCES

    def run(self, entries: Sequence[BatchEntry]) -> Tensor:
        """Logits of the requested rows, [rows, padded vocabulary]; valid until the next run."""
        pool = entries[0].cache.pool
        num_new = len(entries[0].tokens)
        tables = [cache.pages[: pool.pages_for(cache.length + num_new)] for cache, _, _ in entries]
        width, count = _power_of_two(max(map(len, tables))), _power_of_two(len(entries))
        key = (id(pool), count, num_new, width)
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(pool_batch=self._kernel.empty_batch(pool, *key[1:]))
        self._fill(captured, entries, tables, num_new)
        if captured.graph is None:
            captured.logits = self._call(captured)
        else:
            captured.graph.replay()
        wanted = [i for s, e in enumerate(entries) for i in range((s + 1) * num_new - e.num_rows, (s + 1) * num_new)]
        if len(wanted) == len(captured.rows):
            return captured.logits
        return captured.logits[torch.tensor(wanted, dtype=torch.long).to(self._device, non_blocking=True)]

    def _fill(self, captured: _Captured, entries: Sequence[BatchEntry], tables: list[list[int]], num_new: int) -> None:
        """Writes the pass into the static buffers; tokens on the device are not copied to the host."""
        batch, used = captured.batch, len(entries) * num_new
        spare_page = batch.pool.num_pages
        batch.table.copy_(_table(tables, batch.table.shape, spare_page), non_blocking=True)
        lengths = [cache.length + num_new for cache, _, _ in entries]
        lengths += [num_new] * (len(batch.lengths) - len(lengths))
        batch.lengths.copy_(torch.tensor(lengths, dtype=torch.int32), non_blocking=True)
        slots = [slot for cache, _, _ in entries for slot in cache.slots(num_new)]
        slots += [batch.pool.spare_slot] * (len(batch.slots) - used)
        batch.slots.copy_(torch.tensor(slots), non_blocking=True)
        positions = [cache.length + i for cache, _, _ in entries for i in range(num_new)]
        captured.positions[:used].copy_(torch.tensor(positions), non_blocking=True)
        for s, (_, tokens, _) in enumerate(entries):
            source = torch.as_tensor(tokens, dtype=torch.long)
            captured.tokens[s * num_new : (s + 1) * num_new].copy_(source, non_blocking=True)

    def _capture(self, pool_batch: PagedBatch) -> _Captured:
        total = len(pool_batch.slots)
        captured = _Captured(
            tokens=torch.zeros(total, dtype=torch.long, device=self._device),
            positions=torch.zeros(total, dtype=torch.long, device=self._device),
            rows=torch.arange(total, device=self._device),
            batch=pool_batch,
            logits=torch.empty(0),
            graph=None,
        )
        if self._device.type == "cuda":
            # Libraries allocate memory in a first pass, which must not be captured. It writes only to the spare page.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._call(captured)
            torch.cuda.current_stream().wait_stream(side)
            captured.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured.graph):
                captured.logits = self._call(captured)
        return captured

    def _call(self, captured: _Captured) -> Tensor:
        return self._decoder(captured.tokens, captured.positions, captured.batch, captured.rows)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _table(tables: list[list[int]], shape: torch.Size, spare_page: int) -> Tensor:
    padded = torch.full(tuple(shape), spare_page, dtype=torch.int32)
    for row, pages in zip(padded, tables, strict=False):
        row[: len(pages)] = torch.tensor(pages, dtype=torch.int32)
    return padded
