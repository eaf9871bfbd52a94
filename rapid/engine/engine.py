"""The batching loop: one model, many sequences, turn after turn on the process's compute thread.

A *task* is a generator. It yields `ForwardRequest`s ("append these tokens to this sequence, and give me the logits of
the last rows"), and the engine sends it the logits. It then yields what it wants of them (`rapid.engine.readout`).
Prefill, propose and verify (`rapid.engine.verify`, `rapid.engine.propose`) are such generators, so the loop does not
know drafts or rules. Each iteration (`rapid.engine.passes`) gathers the requests of all live tasks, cuts them to a
token budget, runs one ragged forward pass, hands the rows back, and computes what is wanted of them for all tasks at
once. Target and drafter use the same class.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from rapid.engine.admission import Admission
from rapid.engine.messages import EngineStats, Pulse, SequenceRequest
from rapid.engine.pacing import STEP_BUDGET_MS
from rapid.engine.passes import Passes
from rapid.engine.sequence import Sequence, Task
from rapid.engine.tasks import RunningTasks, settle
from rapid.engine.torch_thread import compute, soon
from rapid.errors import EngineLost, SequenceClosed
from rapid.models.info import GraphLimits
from rapid.sampling.logits_processor import LogitProcessor

if TYPE_CHECKING:
    from rapid.models.model import Model

T = TypeVar("T")
logger = logging.getLogger(__name__)

_STEPS_AT_ONCE = 16  # of drafts, before another engine of the process has its turn
_GATHER_S = 0.004
_FIRST_CALL_S = 0.015  # of a sequence just opened, which is told to another process first
_BETWEEN_ROUNDS = 1.0  # seconds in which a sequence that decoded is expected to decode on
_IDLE_TURN_S = 1.0  # so often an engine without work looks for sequences that have expired


class Engine:
    """Runs tasks over sequences, batched, within ``kv_bytes`` of keys and values.

    ``max_batch_tokens`` bounds one forward pass; by default it is the device's (`rapid.engine.pacing`). While sequences
    decode, a pass that reads prompts takes about ``step_budget_ms``, so that a long prefill does not starve them. A
    sequence is admitted when there is room for all tokens that it can need; up to ``max_queued`` requests wait for room
    in order of arrival. A sequence that is not used for ``idle_timeout`` seconds, or not for the first time within ten,
    is closed: the request that opened it is gone. ``graphs`` limits the recording of CUDA graphs, which the constructor
    waits for; those of whole drafts are recorded only if the engine ``drafts``.

    Before a pass the engine waits a few milliseconds for sequences that are between two rounds. Else they would fall
    into groups, of which each waits for the passes of the others. An engine that shares the process's compute thread
    with a drafter's engine ``gathers`` apart from that thread, too, where the drafts go on meanwhile.

    The engine works in turns on the compute thread (`rapid.engine.torch_thread`), and whoever brings work asks for the
    next turn himself: to wake a thread that only asks would cost each round as much again.

    ``ended`` is done when there is no further turn: after `shutdown`, or after an error that breaks the engine. Every
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
        self._tasks = RunningTasks()
        self._passes = Passes(
            model, self._pool, self._tasks, max_batch_tokens=max_batch_tokens, step_budget_ms=step_budget_ms
        )
        compute(self._passes.prepare, graphs, drafts=drafts)  # now, because it would delay a request
        self._admission = Admission(self._pool, model.info.name, max_queued=max_queued, idle_timeout=idle_timeout)
        self.gathers = False
        self.ended: Future[None] = Future()
        self._submitted: deque[tuple[Task[Any], Future[Any]]] = deque()
        lock = threading.RLock()
        self._wake = threading.Condition(lock)
        self._news = threading.Condition(lock)  # for who gathers
        self._decoding = False  # whether sequences decode, in the next pass or soon
        self._ending: EngineLost | None = None  # why the engine refuses new tasks
        self._has_turn = False  # one is under way, or soon will be
        self._again = False  # something has happened that another turn must look at
        self._asking = threading.Thread(target=self._ask, name=f"engine-{model.info.name}", daemon=True)
        self._asking.start()

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
            self._go_on()
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
            self._go_on()

    def submit(self, task: Task[T], sequence: Sequence | None = None) -> Future[T]:
        """Runs ``task`` to its end; the future gets its return value, or the exception that ended it.

        Cancelling the future ends the task before the next pass. Passes wait a little for the next task of a
        ``sequence`` that has its answer.
        """
        future: Future[T] = Future()
        with self._wake:
            if sequence is not None:
                sequence.asks()
                future.add_done_callback(partial(self._has_answered, sequence))
            if self._ending:
                future.set_exception(copy.copy(self._ending))
            else:
                self._submitted.append((task, future))
                self._go_on()
        return future

    def _has_answered(self, sequence: Sequence, _: Future[Any]) -> None:
        with self._wake:
            sequence.is_answered()

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
                forward_passes=self._passes.count,
                tokens_processed=self._passes.tokens_processed,
                out_of_memory=self._passes.out_of_memory,
                host_waits=self._tasks.host_waits,
                pulse=self.pulse(),
            )

    def pulse(self) -> Pulse:
        """How long the current pass has been running. It waits for nothing, so it answers when the thread hangs."""
        return self._passes.clock.pulse()

    def shutdown(self) -> None:
        """Ends the engine; every open task fails with SequenceClosed."""
        with self._wake:
            self._ending = self._ending or SequenceClosed("the engine is shutting down")
            self._wake.notify()
            self._news.notify_all()
            self._ask_for_a_turn()
        self.ended.result()
        self._asking.join()

    def _ask(self) -> None:
        """Asks for turns where nobody else does: after some time without work, and for an engine that ``gathers``."""
        with self._wake:
            while self._ending is None:
                self._wake.wait(_IDLE_TURN_S)
                self._gather()
                self._ask_for_a_turn()

    def _go_on(self) -> None:
        """Sees to it that a turn looks at what is new; needs `_wake`."""
        self._news.notify_all()
        if self.gathers:
            self._wake.notify()  # not on the compute thread, where the other engine drafts meanwhile
        else:
            self._ask_for_a_turn()

    def _ask_for_a_turn(self) -> None:
        self._again = True
        if not (self._has_turn or self.ended.done()):
            self._has_turn = True
            self._passes.clock.begin()
            soon(self._turn)

    def _turn(self) -> None:
        """On the compute thread."""
        try:
            with self._wake:
                self._again = False
                self._update_admission()
            if self._ending is None and (self._submitted or self._tasks):
                self._work()
        except Exception as error:
            logger.exception("the engine of %s is broken", self.model.info.name)
            self._ending = EngineLost(f"{self.model.info.name}: its engine is broken: {error}")
        with self._wake:
            self._passes.clock.end()
            self._has_turn = False
            if self._ending is None:
                # A sequence closed while a task worked on it gave back no room yet.
                if self._again or self._submitted or self._tasks or self._admission.num_closing:
                    self._go_on()
                return
            self._wake.notify()
            self._fail_everything()
        self.ended.set_result(None)

    def _gather(self) -> None:
        """Waits a little for sequences that are between two calls; needs `_wake`.

        Else the sequences would fall into groups, of which each waits for the passes of the others.
        """
        while self._submitted or self._tasks:
            left_s = self._admission.pause_left_s(_GATHER_S, _FIRST_CALL_S)
            if left_s <= 0 or not self._news.wait(left_s) or self._ending:
                return

    @torch.inference_mode()
    def _work(self) -> None:
        # The thread has other engines. Drafts are short, and requests wait for each other's: computed to their end,
        # they are verified in one pass, and not by turns with the drafts of the rest.
        with self._wake:
            self._gather()
        for _ in range(_STEPS_AT_ONCE):
            while self._submitted:
                self._tasks.start(*self._submitted.popleft())
            self._tasks.drop_unwanted()
            if self._tasks:
                with torch.cuda.device_of(self._pool.keys[0]):  # for the kernels of sampling
                    self._passes.step(decoding=self._decoding)
            if not self._tasks.are_drafting:
                break

    def _update_admission(self) -> None:
        self._admission.update({running.request.sequence.id for running in self._tasks})
        self._decoding = self._admission.num_decoding(since=time.monotonic() - _BETWEEN_ROUNDS) > 0

    def _fail_everything(self) -> None:
        assert self._ending is not None
        self._admission.refuse(self._ending)
        for future in [future for _, future in self._submitted] + [running.future for running in self._tasks]:
            settle(future, copy.copy(self._ending))
