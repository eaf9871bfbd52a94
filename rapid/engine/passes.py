"""The passes of an engine: what its tasks ask for, computed in one ragged forward pass for all of them."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rapid.engine.compiled_drafts import CompiledDrafts
from rapid.engine.draft_graphs import DraftGraphs
from rapid.engine.pacing import MAX_BATCH_TOKENS, Pacer
from rapid.engine.pass_clock import PassClock
from rapid.engine.readout import Draw, Drawn
from rapid.engine.scheduler import chunks, in_parts, schedule
from rapid.engine.sequence import SharedPass
from rapid.engine.tasks import BREAKING, RunningTask, RunningTasks
from rapid.errors import PassAbandoned
from rapid.kernels.interface import BatchEntry, QueryWatcher
from rapid.kv_cache.memory import is_out_of_memory
from rapid.kv_cache.pool import KVPool
from rapid.models.info import GraphLimits
from rapid.sampling import sampler

if TYPE_CHECKING:
    from rapid.models.model import Model

logger = logging.getLogger(__name__)


class Passes:
    """Runs ``model`` for the ``tasks``, whose sequences have their keys and values in ``pool``.

    `step` is for one thread; any thread may read the counts and the ``clock``.
    """

    def __init__(
        self, model: Model, pool: KVPool, tasks: RunningTasks, *, max_batch_tokens: int | None, step_budget_ms: float
    ) -> None:
        self._model, self._pool, self._tasks = model, pool, tasks
        max_batch_tokens = max_batch_tokens or MAX_BATCH_TOKENS[model.layout.device.type]
        self._pacer = Pacer(max_batch_tokens, step_budget_ms, model.balanced_context)
        self.drafts: DraftGraphs | CompiledDrafts | None = None  # what computes a whole draft, if anything does
        self.clock = PassClock()
        self.count = self.tokens_processed = self.out_of_memory = 0

    @torch.inference_mode()
    def prepare(self, graphs: GraphLimits, *, drafts: bool) -> None:
        """Records and compiles what requests will need."""
        model, device = self._model, self._model.layout.device
        sampler.warm_up(model.vocab_size, device)
        recorded = model.record(self._pool, graphs)
        if recorded is not None and drafts:
            self.drafts = DraftGraphs(recorded, model.vocab_size, device)
        elif drafts and (steps := model.compiled_steps()) is not None:
            self.drafts = CompiledDrafts(steps, model.vocab_size)

    def step(self, *, decoding: bool) -> None:
        """Schedules the tasks' requests, runs a pass, sends the rows back, and reads out what is wanted of them.

        A pass that reads prompts is short while somebody waits for tokens: ``decoding`` says that somebody soon will.

        Raises:
            EngineLost, torch.AcceleratorError: no later pass can succeed.
        """
        for running in [r for r in self._tasks if r.request.tokens is None]:
            # Another sequence may have computed the same prefix since the last pass.
            self._pool.adopt(running.request.sequence.cache, running.request.sequence.prompt)
            if running.num_left <= 0:
                self._tasks.resume(running, None)
        self._tasks.read_out()
        scheduled = schedule(self._tasks, self._budget(decoding))
        if not scheduled:
            return
        reading, _ = chunks(scheduled)
        started, count = time.monotonic(), self.count
        self._run(scheduled)
        if reading and self._pool.keys[0].is_cuda:
            # Nobody waits for a prefill's results, so the host would run ahead, past all requests that come meanwhile.
            torch.cuda.synchronize()
        if self.count == count + 1 and not self.clock.has_compiled:
            self._pacer.observe((time.monotonic() - started) * 1e3, reading)

    def _budget(self, decoding: bool) -> int:
        """How many tokens the next pass may have."""
        reading = [r.request.sequence.cache.length for r in self._tasks if r.request.tokens is None]
        num_decoding = sum(r.num_left for r in self._tasks if r.request.tokens is not None)
        return self._pacer.num_tokens(num_decoding, reading, streaming=decoding or num_decoding > 0)

    def _run(self, scheduled: list[tuple[RunningTask, int]]) -> None:
        """One pass; if there is no memory for it, several smaller ones."""
        entries = [
            BatchEntry(r.request.table, r.chunk(n), r.request.num_rows if n == r.num_left else 0) for r, n in scheduled
        ]
        watchers = [r.request.watch for r, _ in scheduled]
        parts: list[list[tuple[RunningTask, int]]] = []
        self.clock.begin_pass(self._pacer.expected_s(*chunks(scheduled)))
        try:
            answers, num_passes = self._compute(scheduled, entries, watchers)
        except PassAbandoned:
            return
        except Exception as error:
            no_memory = is_out_of_memory(error)
            if isinstance(error, BREAKING) and not no_memory:
                raise
            parts = in_parts(scheduled) if no_memory else []
            self.out_of_memory += no_memory
            logger.warning("a forward pass over %d sequences failed", len(entries), exc_info=not parts)
            if not parts:
                for running, _ in scheduled:
                    self._tasks.finish(running, error)
                return
        if parts:  # here and not in the handler, whose exception keeps the failed pass's memory
            self._run_in_parts(parts, sum(n for _, n in scheduled))
        else:
            self.count += num_passes
            self.tokens_processed += sum(num_tokens + num_passes - 1 for _, num_tokens in scheduled)
            self._send(scheduled, answers)

    def _compute(
        self,
        scheduled: list[tuple[RunningTask, int]],
        entries: list[BatchEntry],
        watchers: list[QueryWatcher | None],
    ) -> tuple[list[Tensor] | list[Drawn], int]:
        """What a pass gives each task; or several passes, if all tasks draft and can go on by themselves. How many."""
        ready = [r.request for r, n in scheduled if n == r.num_left and r.request.view is None]
        drawings = [request.drawing for request in ready if request.drawing is not None]
        heads = [r.request.sequence.head for r, _ in scheduled]

        def abandoned() -> bool:
            return all(r.is_unwanted for r, _ in scheduled)

        if self.drafts is not None and len(drawings) == len(scheduled):
            drawn = self.drafts.run(entries, heads, drawings, abandoned)
            if drawn is not None:
                return drawn
        return self._model.forward(entries, heads=heads, abandoned=abandoned, watchers=watchers), 1

    def _run_in_parts(self, parts: list[list[tuple[RunningTask, int]]], num_tokens: int) -> None:
        """Smaller passes after one of ``num_tokens`` for which there was no memory."""
        if any(r.request.tokens is None for part in parts for r, _ in part):
            self._pacer.too_large(num_tokens)
        logger.warning("no memory for %d tokens in a pass; from now on at most %d", num_tokens, self._pacer.max_tokens)
        if self._pool.keys[0].is_cuda:
            torch.cuda.empty_cache()
        for part in parts:
            self._run(part)

    def _send(self, scheduled: list[tuple[RunningTask, int]], answers: list[Tensor] | list[Drawn]) -> None:
        """Gives each task its rows of logits, or what was drawn."""
        decoding = [num_tokens for running, num_tokens in scheduled if running.request.tokens is not None]
        shared = SharedPass(len(decoding), sum(decoding))
        for (running, num_tokens), answer in zip(scheduled, answers, strict=True):
            sequence = running.request.sequence
            sequence.last_used = time.monotonic()
            running.num_done += num_tokens
            if running.request.tokens is None:
                self._pool.insert(sequence.cache, sequence.prompt, sequence.cache.length)
            else:
                sequence.decoded_at, sequence.shared = sequence.last_used, shared
            if running.num_left > 0:
                continue
            if running.request.drawing is not None and isinstance(answer, Tensor):
                ids = None if sequence.head is None else sequence.head.ids
                running.readout = Draw(answer, running.request.drawing, ids)
            else:
                self._tasks.resume(running, answer)
        self._tasks.read_out()
