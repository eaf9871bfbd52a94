"""The batching loop: one model, one thread, many sequences.

A *task* is a generator. It yields `ForwardRequest`s ("append these tokens to this sequence, and give me the logits of
the last rows"), and the engine sends it the logits. It then yields what it wants of them (`rapid.engine.readout`).
Prefill, propose and verify (`rapid.engine.verify`, `rapid.engine.propose`) are such generators, so the loop does not
know drafts or rules. Each iteration gathers the requests of all live tasks, cuts them to a token budget, runs one
ragged forward pass, hands the rows back, and computes what is wanted of them for all tasks at once. Target and drafter
use the same class.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from rapid.engine.admission import Admission
from rapid.engine.compiled_drafts import CompiledDrafts
from rapid.engine.draft_graphs import DraftGraphs
from rapid.engine.messages import EngineStats, Pulse, SequenceRequest
from rapid.engine.pacing import MAX_BATCH_TOKENS, STEP_BUDGET_MS, Pacer
from rapid.engine.pass_clock import PassClock
from rapid.engine.readout import Draw, Drawn
from rapid.engine.scheduler import chunks, in_parts, schedule
from rapid.engine.sequence import Sequence, SharedPass, Task
from rapid.engine.tasks import BREAKING, RunningTask, RunningTasks, settle
from rapid.engine.torch_thread import compute
from rapid.errors import EngineLost, PassAbandoned, SequenceClosed
from rapid.kernels.interface import BatchEntry, QueryWatcher
from rapid.kv_cache.memory import is_out_of_memory
from rapid.models.info import GraphLimits
from rapid.sampling import sampler
from rapid.sampling.logits_processor import LogitProcessor

if TYPE_CHECKING:
    from rapid.models.model import Model

T = TypeVar("T")
logger = logging.getLogger(__name__)

_STEPS_AT_ONCE = 16  # of drafts, before another engine of the process has its turn
_GATHER_S = 0.004
_BETWEEN_ROUNDS = 1.0  # seconds in which a sequence that decoded is expected to decode on


class Engine:
    """Runs tasks over sequences in a thread of its own, batched, within ``kv_bytes`` of keys and values.

    ``max_batch_tokens`` bounds one forward pass; by default it is the device's (`rapid.engine.pacing`). While sequences
    decode, a pass that reads prompts takes about ``step_budget_ms``, so that a long prefill does not starve them. A
    sequence is admitted when there is room for all tokens that it can need; up to ``max_queued`` requests wait for room
    in order of arrival. A sequence that is not used for ``idle_timeout`` seconds is closed: the request that opened it
    is gone. ``graphs`` limits the recording of CUDA graphs, which the constructor waits for; those of whole drafts are
    recorded only if the engine ``drafts``. An engine that shares the process's compute thread with a drafter's engine
    ``gathers``: before a pass it waits a few milliseconds for sequences that are between two rounds. Else the requests
    would fall into groups, of which each waits for the drafts and the verifications of the others.

    ``ended`` is done when the thread has ended: after `shutdown`, or after an error that breaks the engine. Every
    pending and every later call then fails with EngineLost.
    """

    def __init__(
        self,
        model: Model,
        *,
        kv_bytes: int,
        max_batch_tokens: int | None = None,
        step_budget_ms: float = STEP_BUDGET_MS,
        max_queued: int = 64,
        idle_timeout: float = 600.0,
        graphs: GraphLimits = GraphLimits(),  # noqa: B008 (frozen)
        drafts: bool = True,
    ) -> None:
        self.model = model
        self._pool = model.new_pool(kv_bytes)
        self._drafts: DraftGraphs | CompiledDrafts | None = None
        compute(self._prepare, graphs, drafts)  # now, because it would delay a request
        self._admission = Admission(self._pool, model.info.name, max_queued=max_queued, idle_timeout=idle_timeout)
        max_batch_tokens = max_batch_tokens or MAX_BATCH_TOKENS[model.layout.device.type]
        self._pacer = Pacer(max_batch_tokens, step_budget_ms, model.balanced_context)
        self.gathers = False
        self.ended: Future[None] = Future()
        self._submitted: deque[tuple[Task[Any], Future[Any]]] = deque()
        self._tasks = RunningTasks()
        self._forward_passes = self._tokens_processed = self._out_of_memory = 0
        self._clock = PassClock()
        self._wake = threading.Condition()
        self._decoding = False  # whether sequences decode, in the next pass or soon
        self._ending: EngineLost | None = None  # why the engine refuses new tasks
        self._thread = threading.Thread(target=self._loop, name=f"engine-{model.info.name}", daemon=True)
        self._thread.start()

    def open(self, request: SequenceRequest) -> Future[Sequence]:
        """A future of a new sequence, which has random numbers of its own.

        The future fails with `Overloaded` when there is no room and the request may not wait, or too many requests
        wait. A caller that no longer wants the sequence passes the future to `abandon`.

        Raises:
            InvalidRequest: the sequence needs more than the whole budget.
        """
        logits = None
        if request.logits is not None:
            model = self.model
            logits = LogitProcessor(request.logits, model.tokenizer, model.vocab_size, model.layout.device)
        with self._wake:
            future = self._admission.arrive(request, logits)
            if self._ending:
                self._admission.refuse(copy.copy(self._ending))  # each raise adds a traceback
            self._wake.notify()
        return future

    def abandon(self, opened: Future[Sequence]) -> None:
        """Ends the wait for room that `open` began, or closes the sequence if it was admitted at the same moment."""

        def give_back(done: Future[Sequence]) -> None:
            if not done.cancelled() and done.exception() is None:
                self.close(done.result())

        opened.cancel()
        opened.add_done_callback(give_back)

    def get(self, sequence_id: int) -> Sequence:
        """The open sequence of that id.

        Raises:
            SequenceClosed: the sequence was closed, or expired.
        """
        return self._admission.get(sequence_id)

    def close(self, sequence: Sequence) -> None:
        """Closes the sequence. The engine frees its room before a later pass.

        Tasks on the sequence fail with SequenceClosed: at the next layer if all sequences of the pass are closed, else
        after the pass.
        """
        with self._wake:
            self._admission.leave(sequence)
            self._wake.notify()

    def submit(self, task: Task[T]) -> Future[T]:
        """Runs ``task`` to its end; the future gets its return value, or the exception that ended it.

        Cancelling the future ends the task before the next pass.
        """
        future: Future[T] = Future()
        with self._wake:
            if self._ending:
                future.set_exception(copy.copy(self._ending))
            else:
                self._submitted.append((task, future))
                self._wake.notify()
        return future

    def forget(self, tokens: list[int], salt: str = "") -> Future[int]:
        """Forgets the cached pages of a text with these ``tokens`` (`KVPool.forget`); the future gives their number."""

        def task() -> Task[int]:
            return self._pool.forget(tokens, salt)
            yield

        return self.submit(task())

    def stats(self) -> EngineStats:
        """The engine's open and waiting sequences, its memory, and its counts since the start."""
        with self._wake:
            return EngineStats(
                num_sequences=self._admission.num_sequences,
                num_waiting=self._admission.num_waiting,
                kv_bytes=self._admission.kv.bytes_used,
                kv=self._admission.kv,
                forward_passes=self._forward_passes,
                tokens_processed=self._tokens_processed,
                out_of_memory=self._out_of_memory,
                host_waits=self._tasks.host_waits,
                pulse=self.pulse(),
            )

    def pulse(self) -> Pulse:
        """How long the current pass has been running. It waits for nothing, so it answers when the thread hangs."""
        return self._clock.pulse()

    def shutdown(self) -> None:
        """Ends the thread; every open task fails with SequenceClosed."""
        with self._wake:
            self._ending = self._ending or SequenceClosed("the engine is shutting down")
            self._wake.notify()
        self._thread.join()

    def _loop(self) -> None:
        try:
            while self._ending is None:
                with self._wake:
                    self._update_admission()
                    while not (self._submitted or self._tasks or self._ending):
                        self._wake.wait(timeout=1.0)
                        self._update_admission()
                    self._gather()
                if self._ending is None:
                    with self._clock.running():
                        compute(self._work)
        except Exception as error:
            logger.exception("the engine of %s is broken", self.model.info.name)
            with self._wake:
                self._ending = EngineLost(f"{self.model.info.name}: its engine is broken: {error}")
        with self._wake:
            self._fail_everything()
        self.ended.set_result(None)

    def _gather(self) -> None:
        """Waits a little for sequences that are between two rounds, if this engine ``gathers``; needs `_wake`."""
        until = time.monotonic() + _GATHER_S * self.gathers
        while (left_s := until - time.monotonic()) > 0:
            num_expected = self._admission.num_decoding(since=time.monotonic() - _BETWEEN_ROUNDS)
            if len(self._submitted) + len(self._tasks) >= num_expected:
                return
            self._wake.wait(left_s)

    @torch.inference_mode()
    def _prepare(self, graphs: GraphLimits, drafts: bool) -> None:
        """Records and compiles what requests will need."""
        sampler.warm_up(self.model.vocab_size, self.model.layout.device)
        recorded = self.model.record(self._pool, graphs)
        if recorded is not None and drafts:
            self._drafts = DraftGraphs(recorded, self.model.vocab_size, self.model.layout.device)
        elif drafts and (steps := self.model.compiled_steps()) is not None:
            self._drafts = CompiledDrafts(steps, self.model.vocab_size)

    @torch.inference_mode()
    def _work(self) -> None:
        # The thread has other engines. Drafts are short, and requests wait for each other's: computed to their end,
        # they are verified in one pass, and not by turns with the drafts of the rest.
        with self._wake:
            self._gather()  # also here: the last drafts ended just before this engine's turn
        for _ in range(_STEPS_AT_ONCE):
            while self._submitted:
                self._tasks.start(*self._submitted.popleft())
            self._tasks.drop_unwanted()
            if self._tasks:
                with torch.cuda.device_of(self._pool.keys[0]):  # for the kernels of sampling
                    self._step()
            if not self._tasks.are_drafting:
                break

    def _update_admission(self) -> None:
        self._admission.update({running.request.sequence.id for running in self._tasks})
        self._decoding = self._admission.num_decoding(since=time.monotonic() - _BETWEEN_ROUNDS) > 0

    def _step(self) -> None:
        """One iteration: schedule, run a pass, send the rows back, read out what is wanted of them."""
        for running in [r for r in self._tasks if r.request.tokens is None]:
            # Another sequence may have computed the same prefix since the last pass.
            self._pool.adopt(running.request.sequence.cache, running.request.sequence.prompt)
            if running.num_left <= 0:
                self._tasks.resume(running, None)
        self._tasks.read_out()
        scheduled = schedule(self._tasks, self._budget())
        if not scheduled:
            return
        reading, _ = chunks(scheduled)
        started, passes = time.monotonic(), self._forward_passes
        self._run(scheduled)
        if reading and self._pool.keys[0].is_cuda:
            # Nobody waits for a prefill's results, so the host would run ahead, past all requests that come meanwhile.
            torch.cuda.synchronize()
        if self._forward_passes == passes + 1 and not self._clock.has_compiled:
            self._pacer.observe((time.monotonic() - started) * 1e3, reading)

    def _budget(self) -> int:
        """How many tokens the next pass may have."""
        reading = [r.request.sequence.cache.length for r in self._tasks if r.request.tokens is None]
        num_decoding = sum(r.num_left for r in self._tasks if r.request.tokens is not None)
        return self._pacer.num_tokens(num_decoding, reading, streaming=self._decoding or num_decoding > 0)

    def _run(self, scheduled: list[tuple[RunningTask, int]]) -> None:
        """One pass; if there is no memory for it, several smaller ones."""
        entries = [
            BatchEntry(r.request.table, r.chunk(n), r.request.num_rows if n == r.num_left else 0) for r, n in scheduled
        ]
        watchers = [r.request.watch for r, _ in scheduled]
        parts: list[list[tuple[RunningTask, int]]] = []
        self._clock.begin_pass(self._pacer.expected_s(*chunks(scheduled)))
        try:
            answers, num_passes = self._compute(scheduled, entries, watchers)
        except PassAbandoned:
            return
        except Exception as error:
            no_memory = is_out_of_memory(error)
            if isinstance(error, BREAKING) and not no_memory:
                raise
            parts = in_parts(scheduled) if no_memory else []
            self._out_of_memory += no_memory
            logger.warning("a forward pass over %d sequences failed", len(entries), exc_info=not parts)
            if not parts:
                for running, _ in scheduled:
                    self._tasks.finish(running, error)
                return
        if parts:  # here and not in the handler, whose exception keeps the failed pass's memory
            self._run_in_parts(parts, sum(n for _, n in scheduled))
        else:
            self._forward_passes += num_passes
            self._tokens_processed += sum(num_tokens + num_passes - 1 for _, num_tokens in scheduled)
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

        if self._drafts is not None and len(drawings) == len(scheduled):
            drawn = self._drafts.run(entries, heads, drawings, abandoned)
            if drawn is not None:
                return drawn
        return self.model.forward(entries, heads=heads, abandoned=abandoned, watchers=watchers), 1

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

    def _fail_everything(self) -> None:
        assert self._ending is not None
        self._admission.refuse(self._ending)
        for future in [future for _, future in self._submitted] + [running.future for running in self._tasks]:
            settle(future, copy.copy(self._ending))
