"""Tasks between two passes, and how many tokens of the next pass each task gets."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from rapid.engine.readout import Readout
from rapid.engine.sequence import EarlyResult, ForwardRequest, Task
from rapid.kernels.interface import Tokens


class RunningTask:
    """A task: the latest request that it yielded, how many of its tokens are processed, and what it wants of the rows.

    ``readout`` is None when the task waits for a pass.
    """

    request: ForwardRequest

    def __init__(self, task: Task[Any], future: Future[Any]) -> None:
        self.task, self.future = task, future
        self.num_done = 0
        self.readout: Readout | None = None

    def resume(self, answer: object) -> None:
        """Runs the task to its next request; raises the exception that ends it (StopIteration with its result)."""
        wish = self.task.send(answer)
        while isinstance(wish, EarlyResult):
            settle(self.future, wish.result)
            self.future = wish.rest
            wish = self.task.send(None)
        if isinstance(wish, ForwardRequest):
            self.request, self.num_done, self.readout = wish, 0, None
        else:
            self.readout = wish

    @property
    def num_left(self) -> int:
        sequence, tokens, *_ = self.request
        return len(sequence.prompt) - 1 - sequence.cache.length if tokens is None else len(tokens) - self.num_done

    @property
    def is_unwanted(self) -> bool:
        return self.request.sequence.ended.done() or self.future.cancelled()

    def chunk(self, num_tokens: int) -> Tokens:
        sequence, tokens, *_ = self.request
        if tokens is None:
            return sequence.prompt[sequence.cache.length : sequence.cache.length + num_tokens]
        return tokens[self.num_done : self.num_done + num_tokens]


def schedule(tasks: list[RunningTask], budget: int) -> list[tuple[RunningTask, int]]:
    """How many tokens each task gets: short requests first; long requests share the rest of the budget.

    Sequences that share pages are moved behind the first of them, because attention reads the pages that neighbours
    share once (`rapid.kernels.prefix`).
    """
    scheduled: list[tuple[RunningTask, int]] = []
    for running in sorted(tasks, key=lambda task: task.num_left):
        # All rows of logits of a request come from one pass, so its last part is not cut below that many tokens.
        num_tokens = min(running.num_left, budget)
        if 0 < running.num_left - num_tokens < running.request.num_rows:
            num_tokens = running.num_left - running.request.num_rows
        if num_tokens > 0:
            scheduled.append((running, num_tokens))
            budget -= num_tokens
    if not scheduled and tasks:  # a request for more rows than the budget runs alone, and exceeds it
        shortest = min(tasks, key=lambda task: task.num_left)
        scheduled.append((shortest, shortest.num_left))
    pages = [running.request.sequence.cache.pages for running, _ in scheduled]
    first = {own[0]: i for i, own in reversed(list(enumerate(pages)))}
    order = sorted(range(len(pages)), key=lambda i: (first[pages[i][0]], pages[i]))
    return [scheduled[i] for i in order]


def in_parts(scheduled: list[tuple[RunningTask, int]]) -> list[list[tuple[RunningTask, int]]]:
    """Smaller passes in place of one for which there was no memory; empty if it cannot be cut.

    A single request is cut to its first half, and the rest of it is scheduled later.
    """
    if len(scheduled) > 1:
        middle = len(scheduled) // 2
        return [scheduled[:middle], scheduled[middle:]]
    running, num_tokens = scheduled[0]
    first = min(num_tokens // 2, running.num_left - running.request.num_rows)
    return [[(running, first)]] if first > 0 else []


def settle(future: Future[Any], outcome: object) -> None:
    """Sets the result or the exception of ``future``, unless the future was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
