"""Tasks between two passes: what each wants of its rows, and how each ends."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import torch

from rapid.engine.readout import Download, Draw, Readout
from rapid.engine.refine import Refine
from rapid.engine.sequence import EarlyResult, ForwardRequest, Task
from rapid.engine.verdicts import Verify
from rapid.errors import EngineLost, SequenceClosed
from rapid.kernels.interface import Tokens

# After these errors every later pass fails: a rank is gone, or the device's context is broken. (An out-of-memory error
# is neither.)
BREAKING = (EngineLost, torch.AcceleratorError)


class RunningTask:
    """A task: the latest request that it yielded, how many of its tokens are processed, and what it wants of the rows.

    ``readout`` is None when the task waits for a pass.
    """

    request: ForwardRequest

    def __init__(self, task: Task[Any], future: Future[Any]) -> None:
        self.task, self.future = task, future
        self.num_done = 0
        self.readout: Readout | None = None
        self.is_drafting = False  # whether it has drawn a token, or is about to

    def resume(self, answer: object) -> None:
        """Runs the task to its next request; raises the exception that ends it (StopIteration with its result)."""
        wish = self.task.send(answer)
        while isinstance(wish, EarlyResult):
            settle(self.future, wish.result)
            self.future = wish.rest
            wish = self.task.send(None)
        if isinstance(wish, ForwardRequest):
            self.request, self.num_done, self.readout = wish, 0, None
            self.is_drafting |= wish.drawing is not None
        else:
            self.readout = wish
            self.is_drafting |= isinstance(wish, Draw)

    @property
    def num_left(self) -> int:
        sequence, tokens = self.request.sequence, self.request.tokens
        return len(sequence.prompt) - 1 - sequence.cache.length if tokens is None else len(tokens) - self.num_done

    @property
    def is_in_prompt(self) -> bool:
        """Whether the next token that the pass processes is one of the prompt, perhaps its last."""
        return self.request.sequence.cache.length < len(self.request.sequence.prompt)

    @property
    def is_unwanted(self) -> bool:
        return self.request.sequence.ended.done() or self.future.cancelled()

    def chunk(self, num_tokens: int) -> Tokens:
        sequence, tokens = self.request.sequence, self.request.tokens
        if tokens is None:
            return sequence.prompt[sequence.cache.length : sequence.cache.length + num_tokens]
        return tokens[self.num_done : self.num_done + num_tokens]


class RunningTasks:
    """All live tasks of an engine, in the order in which they came.

    The error of a task ends that task alone, unless it is one of `BREAKING`, which every method raises.
    """

    def __init__(self) -> None:
        self._running: list[RunningTask] = []
        self.host_waits = 0  # how often the host waited for the device's numbers

    def __iter__(self) -> Iterator[RunningTask]:
        return iter(self._running)

    def __len__(self) -> int:
        return len(self._running)

    @property
    def are_drafting(self) -> bool:
        """Whether a task draws a draft, token by token."""
        return any(running.is_drafting for running in self._running)

    def start(self, task: Task[Any], future: Future[Any]) -> None:
        """Runs ``task`` to its first request, unless nobody wants it any more."""
        if not future.cancelled():
            self._running.append(RunningTask(task, future))
            self.resume(self._running[-1], None)

    def resume(self, running: RunningTask, answer: object) -> None:
        """Sends the task its ``answer``."""
        try:
            running.resume(answer)
        except StopIteration as stop:
            self.finish(running, stop.value)
        except BREAKING:
            raise
        except Exception as error:
            self.finish(running, error)

    def finish(self, running: RunningTask, outcome: object) -> None:
        """Ends the task with a result or an exception."""
        self._running.remove(running)
        settle(running.future, outcome)

    def read_out(self) -> None:
        """Gives the tasks what they want of their rows: first what the device computes, then what the host reads."""
        for kind in (Draw, Refine, Verify, Download):
            wanting = [running for running in self._running if isinstance(running.readout, kind)]
            if wanting:
                self._compute_together(kind, wanting)

    def drop_unwanted(self) -> None:
        """Ends the tasks that nobody waits for."""
        for running in [r for r in self._running if r.is_unwanted]:
            running.task.close()
            self.finish(running, SequenceClosed("the request was cancelled"))

    def _compute_together(self, kind: type[Readout], tasks: list[RunningTask]) -> None:
        """Answers ``tasks``, which all want the same ``kind``. If that fails together, each is tried alone."""
        self.host_waits += kind is Download
        try:
            answers: Any = kind.together([task.readout for task in tasks])  # type: ignore[misc]
        except BREAKING:
            raise
        except Exception as error:
            if len(tasks) == 1:
                self.finish(tasks[0], error)
            else:
                for task in tasks:
                    self._compute_together(kind, [task])
            return
        for task, answer in zip(tasks, answers, strict=True):
            self.resume(task, answer)


def settle(future: Future[Any], outcome: object) -> None:
    """Sets the result or the exception of ``future``, unless the future was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
