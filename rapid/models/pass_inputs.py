"""What recorded passes read: their shapes, of which there are few, and the buffers on the device that a pass fills.

The sequences of a pass may have different numbers of new tokens. All graphs read the same buffers, and one copy from
the host fills them. Rows and sequences that a pass leaves over belong to nobody: such rows write to the pool's spare
page, and attention skips such sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rapid.kernels.cuda.attention import FEW_TOKENS
from rapid.kernels.cuda.paged_split import prefix_numbers
from rapid.kernels.interface import BatchEntry
from rapid.kernels.prefix import PrefixGroup
from rapid.kv_cache.pool import KVPool

MAX_SEQUENCES = 32
MIN_ROWS, MAX_ROWS = 16, 256  # of passes in which a sequence has several new tokens
# The most new tokens of one sequence. Attention has more rows a program for more of them, and so fewer programs.
MAX_NEW = (1, 8, FEW_TOKENS)


class Shape(NamedTuple):
    """What a graph holds: up to so many rows, sequences, and new tokens of one sequence.

    With ``shares`` it reads the pages that sequences share once.
    """

    rows: int
    sequences: int
    max_new: int
    shares: bool = False

    @classmethod
    def of(cls, counts: Sequence[int]) -> Shape | None:
        """The shape for sequences of these numbers of new tokens; None if there is no graph for so many."""
        longest, total, sequences = max(counts), sum(counts), _power_of_two(len(counts))
        if longest > FEW_TOKENS or sequences > MAX_SEQUENCES or total > MAX_ROWS:
            return None
        max_new = next(most for most in MAX_NEW if most >= longest)
        return cls(sequences if max_new == 1 else max(MIN_ROWS, _power_of_two(total)), sequences, max_new)

    @classmethod
    def all(cls) -> list[Shape]:
        """Every shape, in the order of recording.

        The largest comes first, and the others reuse its memory. Then the smallest come first, which most passes need,
        so that limits leave out the rarest; those of shared pages are the last.
        """
        shapes = {cls(n, n, 1) for n in _powers_of_two(1, MAX_SEQUENCES)}
        for sequences, most in itertools.product(_powers_of_two(1, MAX_SEQUENCES), range(len(MAX_NEW) - 1)):
            fewest = sequences // 2 + 1 + MAX_NEW[most]  # one sequence has more than the smaller shape's, others one
            largest = min(MAX_ROWS, sequences * MAX_NEW[most + 1])
            for rows in _powers_of_two(max(MIN_ROWS, _power_of_two(fewest)), max(MIN_ROWS, _power_of_two(largest))):
                shapes.add(cls(rows, sequences, MAX_NEW[most + 1]))
        *others, largest_shape = sorted(shapes, key=lambda shape: (shape.sequences, shape.rows, shape.max_new))
        alone = [largest_shape, *others]
        return alone + [shape._replace(shares=True) for shape in (*others, largest_shape) if shape.sequences > 1]


class Views(NamedTuple):
    """Parts of one buffer: int64 [rows] each of tokens, their positions, slots, rows that get logits; int32 the rest.

    ``starts`` [sequences + 1], ``lengths`` [sequences] and ``table`` [sequences, width] are as in a `PagedBatch`, and
    ``prefix`` are the tensors of a `SharedPrefix`.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    wanted: Tensor
    starts: Tensor
    lengths: Tensor
    prefix: tuple[Tensor, Tensor, Tensor, Tensor]
    table: Tensor


# The sizes of starts, lengths, and the four tensors of a shared prefix, in the buffer.
_OF_SEQUENCES = [MAX_SEQUENCES + 1, MAX_SEQUENCES, MAX_SEQUENCES + 1, MAX_SEQUENCES, MAX_SEQUENCES, MAX_SEQUENCES]


class PassInputs:
    """The buffers that all graphs over ``pool`` read. Each sequence may have ``width`` pages."""

    def __init__(self, pool: KVPool, *, width: int) -> None:
        device = pool.layout.device
        self._spare_slot, self._page_size, self._width = pool.spare_slot, pool.page_size, width
        self.max_length = width * pool.page_size
        size = self._offset_of_table + -(-MAX_SEQUENCES * width // 2)  # of int64; two numbers of the table are in each
        self._host = torch.zeros(size, dtype=torch.long, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.long, device=device)
        self._views: Any = Views(*map(_as_numpy, self._split(self._host, MAX_ROWS, MAX_SEQUENCES)))
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def on_device(self, shape: Shape) -> Views:
        return self._split(self._device, shape.rows, shape.sequences)

    def clear(self, shape: Shape) -> None:
        """Fills the buffers with a pass of one sequence, which writes to the spare page alone."""
        views = self._views
        for part in (views.tokens, views.positions, views.wanted, views.lengths, views.table, *views.prefix):
            part[:] = 0
        views.slots[:] = self._spare_slot
        for starts in (views.starts, views.prefix[0]):
            starts[0], starts[1:] = 0, 1
        views.lengths[0], views.table[0] = 1, self._spare_slot // self._page_size
        self._upload(shape.sequences)

    def fill(
        self, entries: Sequence[BatchEntry], shape: Shape, groups: Sequence[PrefixGroup] = (), more: int = 0
    ) -> int:
        """Writes a pass into the buffers; returns the number of rows that get logits.

        Tokens that are on the device already are not copied to the host. ``groups`` are those of a shape that shares.
        The table has the pages of ``more`` tokens behind the new ones.
        """
        if self._copied is not None:
            self._copied.synchronize()  # the last pass's copy may still read the host's buffer
        views = self._views
        row = num_wanted = 0
        for s, (cache, new, num_rows) in enumerate(entries):
            end = row + len(new)
            if not isinstance(new, Tensor):
                views.tokens[row:end] = new
            views.positions[row:end] = np.arange(cache.position, cache.position + len(new))
            views.slots[row:end] = cache.slots(len(new))
            views.wanted[num_wanted : num_wanted + num_rows] = np.arange(end - num_rows, end)
            views.starts[s], views.lengths[s] = row, cache.length + len(new)
            pages = cache.pages[: -(-(cache.length + len(new) + more) // self._page_size)]
            views.table[s, : len(pages)] = pages
            row, num_wanted = end, num_wanted + num_rows
        views.tokens[row : shape.rows] = views.positions[row : shape.rows] = 0
        views.slots[row : shape.rows] = self._spare_slot
        views.wanted[num_wanted : shape.rows] = 0
        views.starts[len(entries) : shape.sequences + 1] = row
        views.lengths[len(entries) : shape.sequences] = 0
        if shape.shares:
            for part, numbers in zip(
                views.prefix, prefix_numbers(groups, views.starts[: shape.sequences + 1]), strict=True
            ):
                part[: len(numbers)] = numbers
        self._upload(shape.sequences)
        self._fill_from_device(entries)
        return num_wanted

    def _fill_from_device(self, entries: Sequence[BatchEntry]) -> None:
        row = 0
        for on_device, parts in itertools.groupby((new for _, new, _ in entries), lambda new: isinstance(new, Tensor)):
            neighbours = list(parts)
            end = row + sum(map(len, neighbours))
            if on_device:
                tensors = [part for part in neighbours if isinstance(part, Tensor)]
                self._device[row:end].copy_(torch.cat(tensors), non_blocking=True)
            row = end

    def _upload(self, sequences: int) -> None:
        used = self._offset_of_table + -(-sequences * self._width // 2)
        self._device[:used].copy_(self._host[:used], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    @property
    def _offset_of_table(self) -> int:
        return 4 * MAX_ROWS + -(-sum(_OF_SEQUENCES) // 2)

    def _split(self, buffer: Tensor, rows: int, sequences: int) -> Views:
        tokens, positions, slots, wanted = (part[:rows] for part in buffer[: 4 * MAX_ROWS].split(MAX_ROWS))
        of_sequences = buffer[4 * MAX_ROWS : self._offset_of_table].view(torch.int32)[: sum(_OF_SEQUENCES)]
        starts, lengths, group_starts, *of_groups = of_sequences.split(_OF_SEQUENCES)
        pages, table_rows, skipped = (part[:sequences] for part in of_groups)
        prefix = group_starts[: sequences + 1], pages, table_rows, skipped
        table = buffer[self._offset_of_table :].view(torch.int32)[: sequences * self._width]
        return Views(
            tokens,
            positions,
            slots,
            wanted,
            starts[: sequences + 1],
            lengths[:sequences],
            prefix,
            table.view(sequences, self._width),
        )


def _as_numpy(part: Any) -> Any:
    """Writing to tensors would take longer than the pass of a small model."""
    return part.numpy() if isinstance(part, Tensor) else tuple(map(_as_numpy, part))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _powers_of_two(first: int, last: int) -> list[int]:
    return [1 << i for i in range(first.bit_length() - 1, last.bit_length())]
