"""Passes of few new tokens (draft steps, decode steps, verifications), recorded as CUDA graphs and replayed.

A graph is recorded at load for each `Shape`. Others hold several steps of a few sequences: passes, and between them
what chooses the next tokens on the device.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rapid.kernels.cuda.attention import PagedAttention, PagedBatch, groups_worth_sharing
from rapid.kernels.cuda.paged_split import SharedPrefix
from rapid.kernels.interface import BatchEntry
from rapid.kernels.prefix import PrefixGroup
from rapid.kv_cache.memory import free_memory
from rapid.kv_cache.pool import KVPool
from rapid.models.info import GraphLimits
from rapid.models.llama import Decoder
from rapid.models.pass_inputs import MIN_ROWS, PassInputs, Shape

logger = logging.getLogger(__name__)
Key = TypeVar("Key", bound=Hashable)
MAX_PENDING = 8  # new tokens of a sequence in the first of several steps


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


Replay = Callable[[], None]
# (a step's number, the logits [sequences, padded vocabulary] of each sequence) to the next tokens [sequences]
Choose = Callable[[int, Tensor], Tensor]


class Steps(NamedTuple):
    """Several steps of up to so many sequences, of which the first may have `MAX_PENDING` new tokens each."""

    sequences: int
    steps: int

    @property
    def first(self) -> Shape:
        """Of the first step's pass; the others have one row for each sequence."""
        return Shape(MIN_ROWS, self.sequences, MAX_PENDING)


class GraphRunner:
    """The recorded passes of ``decoder`` over ``pool``, which must live as long as they are run.

    Sequences of more than ``window`` tokens are not supported. What cannot be recorded, or not within ``limits``, is
    left out, with a line in the log. All methods must be called from one thread.
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
        self._inputs = PassInputs(pool, width=min(pool.num_pages, pool.pages_for(window)))
        self._logits: Tensor | None = None
        self._recorder, self._limits, self._started = recorder, limits, time.monotonic()
        self._has_failed = False
        self._replays = self.record(Shape.all(), self._pass_of)

    @property
    def shapes(self) -> frozenset[Shape]:
        """The recorded shapes, a graph for each."""
        return frozenset(self._replays)

    def run(self, entries: Sequence[BatchEntry]) -> Tensor | None:
        """Logits of the requested rows, [rows, padded vocabulary]; the next run overwrites them.

        None if no graph holds a pass of these new tokens, or so long sequences.
        """
        shape = Shape.of([len(tokens) for _, tokens, _ in entries])
        if shape not in self._replays or not self.has_room(entries):
            return None
        groups = groups_worth_sharing(entries)
        if groups and shape._replace(shares=True) in self._replays:
            shape = shape._replace(shares=True)
        assert self._logits is not None
        return self._logits[: self.replay(self._replays[shape], entries, shape, groups)]

    def has_room(self, entries: Sequence[BatchEntry], more: int = 0) -> bool:
        """Whether the buffers hold so long sequences, with ``more`` tokens behind the new ones."""
        return max(cache.length + len(tokens) for cache, tokens, _ in entries) + more <= self._inputs.max_length

    def replay(
        self,
        replay: Replay,
        entries: Sequence[BatchEntry],
        shape: Shape,
        groups: Sequence[PrefixGroup] = (),
        more: int = 0,
    ) -> int:
        """Fills the buffers and replays; returns the number of rows that get logits.

        ``groups`` are those of a shape that shares. ``more`` tokens of each sequence will be written behind the new
        ones.
        """
        with torch.cuda.device_of(self._pool.keys[0]):
            num_rows = self._inputs.fill(entries, shape, groups, more)
            replay()
        return num_rows

    def record(self, keys: Sequence[Key], run_of: Callable[[Key], Callable[[], None]]) -> dict[Key, Replay]:
        """Records for each key, until a limit is reached, what the function of ``run_of`` does."""
        replays: dict[Key, Replay] = {}
        if self._has_failed:
            return replays
        with torch.cuda.device_of(self._pool.keys[0]):
            for key in keys:
                seconds, used = self._taken()
                if seconds >= self._limits.seconds or used >= self._limits.bytes:
                    why = f"{seconds:.1f} of {self._limits.seconds:g} s and "
                    why += f"{used / 2**20:.0f} of {self._limits.bytes / 2**20:.0f} MiB"
                    logger.warning("%d CUDA graphs are not recorded: %s are used", len(keys) - len(replays), why)
                    break
                try:
                    replays[key] = self._recorder.record(run_of(key))
                except Exception as error:  # what a library or a kernel does not allow while recording, of any kind
                    self._has_failed = True
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                    logger.warning("passes run without further CUDA graphs: %s cannot be recorded: %s", key, reason)
                    break
            seconds, used = self._taken()
        logger.info("%d CUDA graphs in %.1f s and %.0f MiB", len(replays), seconds, used / 2**20)
        return replays

    def steps(self, shape: Steps, choose: Choose) -> Callable[[], None]:
        """What `record` takes for `Steps`: a pass over the buffers' tokens, and then passes over chosen tokens.

        ``choose`` is called behind each pass, and keeps what it finds. What is left over of the sequences gets any
        token.
        """
        first = shape.first
        tokens, positions, slots, wanted, starts, lengths, _, table = self._inputs.on_device(first)
        batch = self._batch(slots, table, lengths, starts, first.max_new)
        own_rows = torch.arange(shape.sequences, device=tokens.device)
        page_size, spare_slot = self._pool.page_size, self._pool.spare_slot

        def run() -> None:
            used = lengths > 0
            starts = F.pad(used.cumsum(0, dtype=torch.int32), (1, 0))
            now = lengths
            chosen = choose(0, self._decoder(tokens, positions, batch, wanted[: shape.sequences]))
            for step in range(1, shape.steps):
                positions_now = now.long()
                page, offset = positions_now // page_size, positions_now % page_size
                slots = table.gather(1, page.unsqueeze(1)).squeeze(1) * page_size + offset
                now = now + used
                following = self._batch(slots.where(used, spare_slot).long(), table, now, starts, 1)
                chosen = choose(step, self._decoder(chosen, positions_now, following, own_rows))

        self._inputs.clear(first)
        return run

    def _taken(self) -> tuple[float, int]:
        """Seconds and bytes that recording has taken."""
        return time.monotonic() - self._started, self._recorder.bytes_used()

    def _pass_of(self, shape: Shape) -> Callable[[], None]:
        tokens, positions, slots, wanted, starts, lengths, prefix, table = self._inputs.on_device(shape)
        batch = self._batch(slots, table, lengths, starts, shape.max_new)
        batch.prefix = SharedPrefix(*prefix) if shape.shares else None

        def run() -> None:
            logits = self._decoder(tokens, positions, batch, wanted)
            if self._logits is None:  # the first shape has the most rows
                self._logits = torch.empty_like(logits)
            # Were each graph's own logits kept, then graphs could not share that memory.
            self._logits[: len(logits)].copy_(logits)

        self._inputs.clear(shape)
        return run

    def _batch(self, slots: Tensor, table: Tensor, lengths: Tensor, starts: Tensor, max_new: int) -> PagedBatch:
        return PagedBatch(
            pool=self._pool,
            slots=slots,
            table=table,
            lengths=lengths,
            starts=starts,
            max_new=max_new,
            kernel=self._attention.kernel,
            writer=self._attention.writer,
        )
