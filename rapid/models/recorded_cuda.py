"""Passes of few new tokens (draft steps, decode steps, verifications), recorded as CUDA graphs and replayed.

The sequences of a pass may have different numbers of new tokens. A graph is recorded at load for each `Shape`, of which
there are few. All graphs read the same buffers on the device, and one copy from the host fills them. Rows and sequences
that a pass leaves over belong to nobody: such rows write to the pool's spare page, and attention skips such sequences.
"""

from __future__ import annotations

import itertools
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from rapid.kernels.cuda.attention import FEW_TOKENS, PagedAttention, PagedBatch
from rapid.kernels.interface import BatchEntry
from rapid.kv_cache.memory import free_memory
from rapid.kv_cache.pool import KVPool
from rapid.models.info import GraphLimits
from rapid.models.llama import Decoder

logger = logging.getLogger(__name__)

MAX_SEQUENCES = 32
MIN_ROWS, MAX_ROWS = 16, 256  # of passes in which a sequence has several new tokens
# The most new tokens of one sequence. Attention has more rows a program for more of them, and so fewer programs.
MAX_NEW = (1, 8, FEW_TOKENS)


class Shape(NamedTuple):
    """What a graph holds: up to so many rows, sequences, and new tokens of one sequence."""

    rows: int
    sequences: int
    max_new: int

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
        so that limits leave out the rarest.
        """
        shapes = {cls(n, n, 1) for n in _powers_of_two(1, MAX_SEQUENCES)}
        for sequences, most in itertools.product(_powers_of_two(1, MAX_SEQUENCES), range(len(MAX_NEW) - 1)):
            fewest = sequences // 2 + 1 + MAX_NEW[most]  # one sequence has more than the smaller shape's, others one
            largest = min(MAX_ROWS, sequences * MAX_NEW[most + 1])
            for rows in _powers_of_two(max(MIN_ROWS, _power_of_two(fewest)), max(MIN_ROWS, _power_of_two(largest))):
                shapes.add(cls(rows, sequences, MAX_NEW[most + 1]))
        *others, largest_shape = sorted(shapes, key=lambda shape: (shape.sequences, shape.rows, shape.max_new))
        return [largest_shape, *others]


class Recorder(Protocol):
    """How a device records what a function launches."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """A function that launches again what ``run`` launches."""
        ...

    def bytes_used(self) -> int:
        """Memory of the device that recording has taken so far."""
        ...


class CudaRecorder:
    """Records CUDA graphs that share one memory pool: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._memory = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()
        self._free = free_memory(device)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            # A first run compiles kernels and makes libraries' workspaces, which must not happen while recording.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                run()
            torch.cuda.current_stream().wait_stream(self._stream)
            torch.cuda.synchronize()
            # In the default mode another thread that allocates memory would make the recording fail.
            with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
                run()
        return graph.replay

    def bytes_used(self) -> int:
        return max(0, self._free - free_memory(self._device))


def recorder_of(device: torch.device) -> Recorder | None:
    """How ``device`` records; None if it does not."""
    return CudaRecorder(device) if device.type == "cuda" else None


class GraphRunner:
    """The recorded passes of ``decoder`` over ``pool``, which must live as long as they are run.

    Sequences of more than ``window`` tokens are not supported. A shape that cannot be recorded, or not within
    ``limits``, is left out, with a line in the log. All methods must be called from one thread.
    """

    def __init__(
        self,
        decoder: Decoder,
        attention: PagedAttention,
        pool: KVPool,
        recorder: Recorder,
        *,
        window: int,
        limits: GraphLimits,
    ) -> None:
        self._decoder, self._attention = decoder, attention
        self._pool = weakref.proxy(pool)  # graphs must not keep the memory of a pool that nobody uses any more
        self._inputs = _Inputs(pool, width=min(pool.num_pages, pool.pages_for(window)))
        self._logits: Tensor | None = None
        self._replays: dict[Shape, Callable[[], None]] = {}
        with torch.cuda.device_of(pool.keys[0]):
            self._record_all(recorder, limits)

    @property
    def shapes(self) -> frozenset[Shape]:
        """The recorded shapes, a graph for each."""
        return frozenset(self._replays)

    def supports(self, entries: Sequence[BatchEntry]) -> bool:
        """Whether a graph holds a pass of these new tokens."""
        lengths = (cache.length + len(tokens) for cache, tokens, _ in entries)
        return self._shape(entries) in self._replays and max(lengths) <= self._inputs.max_length

    def run(self, entries: Sequence[BatchEntry]) -> Tensor:
        """Logits of the requested rows, [rows, padded vocabulary]; the next run overwrites them."""
        shape = self._shape(entries)
        assert shape is not None and self._logits is not None
        with torch.cuda.device_of(self._logits):
            num_rows = self._inputs.fill(entries, shape)
            self._replays[shape]()
        return self._logits[:num_rows]

    def _shape(self, entries: Sequence[BatchEntry]) -> Shape | None:
        return Shape.of([len(tokens) for _, tokens, _ in entries])

    def _record_all(self, recorder: Recorder, limits: GraphLimits) -> None:
        started, shapes = time.monotonic(), Shape.all()
        for shape in shapes:
            seconds, used = time.monotonic() - started, recorder.bytes_used()
            if seconds >= limits.seconds or used >= limits.bytes:
                why = f"{seconds:.1f} of {limits.seconds:g} s and {used / 2**20:.0f} of {limits.bytes / 2**20:.0f} MiB"
                logger.warning("%d CUDA graphs are not recorded: %s are used", len(shapes) - len(self._replays), why)
                break
            try:
                self._replays[shape] = recorder.record(self._pass_of(shape))
            except Exception as error:  # what a library or a kernel does not allow while recording, of any kind
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                logger.warning("passes run without further CUDA graphs: %s cannot be recorded: %s", shape, reason)
                break
        seconds, used = time.monotonic() - started, recorder.bytes_used()
        logger.info("%d CUDA graphs in %.1f s and %.0f MiB", len(self._replays), seconds, used / 2**20)

    def _pass_of(self, shape: Shape) -> Callable[[], None]:
        tokens, positions, slots, wanted, starts, lengths, table = self._inputs.on_device(shape)
        batch = PagedBatch(
            pool=self._pool,
            slots=slots,
            table=table,
            lengths=lengths,
            starts=starts,
            max_new=shape.max_new,
            kernel=self._attention.kernel,
            writer=self._attention.writer,
        )

        def run() -> None:
            logits = self._decoder(tokens, positions, batch, wanted)
            if self._logits is None:  # the first shape has the most rows
                self._logits = torch.empty_like(logits)
            # Were each graph's own logits kept, then graphs could not share that memory.
            self._logits[: len(logits)].copy_(logits)

        self._inputs.clear(shape)
        return run


class _Views(NamedTuple):
    """Parts of one buffer: int64 [rows] each of tokens, their positions, slots, rows that get logits; int32 the rest.

    ``starts`` [sequences + 1], ``lengths`` [sequences] and ``table`` [sequences, width] are as in a `PagedBatch`.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    wanted: Tensor
    starts: Tensor
    lengths: Tensor
    table: Tensor


class _Inputs:
    """The buffers that all graphs over ``pool`` read. Each sequence may have ``width`` pages."""

    def __init__(self, pool: KVPool, *, width: int) -> None:
        device = pool.layout.device
        self._spare_slot, self._page_size, self._width = pool.spare_slot, pool.page_size, width
        self.max_length = width * pool.page_size
        size = self._offset_of_table + -(-MAX_SEQUENCES * width // 2)  # of int64; two numbers of the table are in each
        self._host = torch.zeros(size, dtype=torch.long, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.long, device=device)
        self._views = [part.numpy() for part in self._split(self._host, MAX_ROWS, MAX_SEQUENCES)]
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def on_device(self, shape: Shape) -> _Views:
        return self._split(self._device, shape.rows, shape.sequences)

    def clear(self, shape: Shape) -> None:
        """Fills the buffers with a pass of one sequence, which writes to the spare page alone."""
        tokens, positions, slots, wanted, starts, lengths, table = self._views
        for part in (tokens, positions, wanted, lengths, table):
            part[:] = 0
        slots[:], starts[0], starts[1:], lengths[0] = self._spare_slot, 0, 1, 1
        table[0] = self._spare_slot // self._page_size
        self._upload(shape.sequences)

    def fill(self, entries: Sequence[BatchEntry], shape: Shape) -> int:
        """Writes a pass into the buffers; returns the number of rows that get logits.

        Tokens that are on the device already are not copied to the host.
        """
        if self._copied is not None:
            self._copied.synchronize()  # the last pass's copy may still read the host's buffer
        tokens, positions, slots, wanted, starts, lengths, table = self._views
        row = num_wanted = 0
        for s, (cache, new, num_rows) in enumerate(entries):
            end = row + len(new)
            if not isinstance(new, Tensor):
                tokens[row:end] = new
            positions[row:end] = np.arange(cache.length, cache.length + len(new))
            slots[row:end] = cache.slots(len(new))
            wanted[num_wanted : num_wanted + num_rows] = np.arange(end - num_rows, end)
            starts[s], lengths[s] = row, cache.length + len(new)
            pages = cache.pages[: -(-int(lengths[s]) // self._page_size)]
            table[s, : len(pages)] = pages
            row, num_wanted = end, num_wanted + num_rows
        tokens[row : shape.rows] = positions[row : shape.rows] = 0
        slots[row : shape.rows] = self._spare_slot
        wanted[num_wanted : shape.rows] = 0
        starts[len(entries) : shape.sequences + 1] = row
        lengths[len(entries) : shape.sequences] = 0
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
        return 4 * MAX_ROWS + MAX_SEQUENCES + 1

    def _split(self, buffer: Tensor, rows: int, sequences: int) -> _Views:
        tokens, positions, slots, wanted = (part[:rows] for part in buffer[: 4 * MAX_ROWS].split(MAX_ROWS))
        of_sequences = buffer[4 * MAX_ROWS : self._offset_of_table].view(torch.int32)
        table = buffer[self._offset_of_table :].view(torch.int32)[: sequences * self._width]
        starts, lengths = of_sequences[: sequences + 1], of_sequences[MAX_SEQUENCES + 1 :][:sequences]
        return _Views(tokens, positions, slots, wanted, starts, lengths, table.view(sequences, self._width))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _powers_of_two(first: int, last: int) -> list[int]:
    return [1 << i for i in range(first.bit_length() - 1, last.bit_length())]
