"""The batching loop: one model, one thread, many sequences.

A *task* is a generator that yields `ForwardRequest`s ("append these tokens to this sequence and give me the logits of the
last rows") and is sent the logits. Prefill, propose and verify (`rapid.engine.verify`) are such generators, so the loop knows
nothing of drafts or rules: it gathers what all live tasks ask for, cuts it to a token budget, runs one ragged forward
pass, and hands the rows back. Target and drafter are the same class.
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
from rapid.engine.messages import EngineStats, SequenceRequest
from rapid.engine.scheduler import RunningTask, schedule, settle
from rapid.engine.sequence import Sequence, Task
from rapid.engine.torch_thread import compute
from rapid.errors import EngineLost, PassAbandoned, SequenceClosed
from rapid.kernels.interface import BatchEntry
from rapid.sampling.logits_processor import LogitProcessor

if TYPE_CHECKING:
    from rapid.models.model import Model

T = TypeVar("T")
logger = logging.getLogger(__name__)

# After these no pass will ever do: a rank is gone, or the device's context is broken. (Memory that ran out is neither.)
_BREAKING = (EngineLost, torch.AcceleratorError)


class Engine:
    """Runs tasks over sequences in a thread of its own, batched, within ``kv_bytes`` of keys and values.

    ``max_batch_tokens`` bounds one forward pass, so that a long prefill neither starves the others nor delays a
    cancellation. A sequence is admitted when there is room for all it can ever need; up to ``max_queued`` wait for that
    in order of arrival. One that is not used for ``idle_timeout`` seconds is closed: its owner is gone.

    ``ended`` is done when the thread is: after `shutdown`, or because something broke that no task is to blame for.
    Everything that was asked of it, or is asked later, then fails with EngineLost.
    """

    def __init__(
        self,
        model: Model,
        *,
        kv_bytes: int,
        max_batch_tokens: int = 128,
        max_queued: int = 64,
        idle_timeout: float = 600.0,
    ) -> None:
        self.model = model
        self._pool = model.new_pool(kv_bytes)
        self._admission = Admission(self._pool, model.info.name, max_queued=max_queued, idle_timeout=idle_timeout)
        self._max_batch_tokens = max_batch_tokens
        self.ended: Future[None] = Future()
        self._submitted: deque[tuple[Task[Any], Future[Any]]] = deque()
        self._running: list[RunningTask] = []
        self._forward_passes = self._tokens_processed = 0
        self._wake = threading.Condition()
        self._ending: EngineLost | None = None  # why nothing is taken any more
        self._thread = threading.Thread(target=self._loop, name=f"engine-{model.info.name}", daemon=True)
        self._thread.start()

    def open(self, request: SequenceRequest) -> Future[Sequence]:
        """A new sequence, with a random generator of its own.

        The future fails with `Overloaded` when there is no room and the sequence may not wait, or too many do already.
        A caller that gives up while it waits hands the future to `abandon`.

        Raises:
            InvalidRequest: it needs more than the whole budget.
        """
        logits = None
        if request.logits is not None:
            model = self.model
            logits = LogitProcessor(request.logits, model.tokenizer, model.vocab_size, model.layout.device)
        with self._wake:
            future = self._admission.arrive(request, logits)
            if self._ending:
                self._admission.refuse(copy.copy(self._ending))  # whoever raises an error leaves a trace in it
            self._wake.notify()
        return future

    def abandon(self, opened: Future[Sequence]) -> None:
        """Ends the wait for room that `open` began, or closes the sequence if it came at the same moment."""

        def give_back(done: Future[Sequence]) -> None:
            if not done.cancelled() and done.exception() is None:
                self.close(done.result())

        opened.cancel()
        opened.add_done_callback(give_back)

    def get(self, sequence_id: int) -> Sequence:
        """The open sequence of that id.

        Raises:
            SequenceClosed: it was closed, or expired.
        """
        return self._admission.get(sequence_id)

    def close(self, sequence: Sequence) -> None:
        """Gives the sequence's room back. Tasks on it fail with SequenceClosed, at the next layer of a pass that is
        nobody else's, and after the pass otherwise."""
        with self._wake:
            self._admission.leave(sequence)
            self._wake.notify()

    def submit(self, task: Task[T]) -> Future[T]:
        """Runs ``task`` to its end; the future has its return value, or the exception that ended it.

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

    def forget(self, tokens: list[int]) -> Future[int]:
        """Drops what is cached of a text of these ``tokens`` (`KVPool.forget`); how many pages that were."""

        def task() -> Task[int]:
            return self._pool.forget(tokens)
            yield

        return self.submit(task())

    def stats(self) -> EngineStats:
        """What the engine holds and has done so far."""
        with self._wake:
            return EngineStats(
                num_sequences=self._admission.num_sequences,
                num_waiting=self._admission.num_waiting,
                kv_bytes=self._admission.kv.bytes_used,
                kv=self._admission.kv,
                forward_passes=self._forward_passes,
                tokens_processed=self._tokens_processed,
            )

    def shutdown(self) -> None:
        """Ends the thread; whatever is still running fails with SequenceClosed."""
        with self._wake:
            self._ending = self._ending or SequenceClosed("the engine is shutting down")
            self._wake.notify()
        self._thread.join()

    def _loop(self) -> None:
        try:
            while self._ending is None:
                with self._wake:
                    self._update_admission()
                    while not (self._submitted or self._running or self._ending):
                        self._wake.wait(timeout=1.0)
                        self._update_admission()
                if self._ending is None:
                    compute(self._work)
        except Exception as error:
            logger.exception("the engine of %s is broken", self.model.info.name)
            with self._wake:
                self._ending = EngineLost(f"{self.model.info.name}: its engine is broken: {error}")
        with self._wake:
            self._fail_everything()
        self.ended.set_result(None)

    @torch.inference_mode()
    def _work(self) -> None:
        while self._submitted:
            self._start(*self._submitted.popleft())
        self._drop_unwanted()
        if self._running:
            self._step()

    def _update_admission(self) -> None:
        self._admission.update({running.request.sequence.id for running in self._running})

    def _step(self) -> None:
        """One iteration: schedule, run, send the rows back."""
        for running in [r for r in self._running if r.request.tokens is None]:
            # Another sequence may have computed the same beginning since the last pass.
            self._pool.adopt(running.request.sequence.cache, running.request.sequence.prompt)
            if running.num_left <= 0:
                self._resume(running, None)
        scheduled = schedule(self._running, self._max_batch_tokens)
        if not scheduled:
            return
        entries = [
            BatchEntry(r.request.sequence.cache, r.chunk(n), r.request.num_rows if n == r.num_left else 0)
            for r, n in scheduled
        ]
        try:
            rows = self.model.forward(entries, abandoned=lambda: all(r.is_unwanted for r, _ in scheduled))
        except PassAbandoned:
            return
        except _BREAKING:
            raise
        except Exception as error:
            logger.exception("a forward pass over %d sequences failed", len(entries))
            for running, _ in scheduled:
                self._finish(running, error)
            return
        self._forward_passes += 1
        self._tokens_processed += sum(num_tokens for _, num_tokens in scheduled)
        for (running, num_tokens), logits in zip(scheduled, rows, strict=True):
            sequence = running.request.sequence
            sequence.last_used = time.monotonic()
            running.num_done += num_tokens
            if running.request.tokens is None:
                self._pool.insert(sequence.cache, sequence.prompt, sequence.cache.length)
            if running.num_left <= 0:
                self._resume(running, logits)

    def _start(self, task: Task[Any], future: Future[Any]) -> None:
        if not future.cancelled():
            self._running.append(RunningTask(task, future))
            self._resume(self._running[-1], None)

    def _resume(self, running: RunningTask, logits: Tensor | None) -> None:
        try:
            running.resume(logits)
        except StopIteration as stop:
            self._finish(running, stop.value)
        except _BREAKING:
            raise
        except Exception as error:
            self._finish(running, error)

    def _finish(self, running: RunningTask, outcome: object) -> None:
        self._running.remove(running)
        settle(running.future, outcome)

    def _drop_unwanted(self) -> None:
        for running in [r for r in self._running if r.is_unwanted]:
            running.task.close()
            self._finish(running, SequenceClosed("the request was cancelled"))

    def _fail_everything(self) -> None:
        assert self._ending is not None
        self._admission.refuse(self._ending)
        for future in [future for _, future in self._submitted] + [running.future for running in self._running]:
            settle(future, copy.copy(self._ending))
