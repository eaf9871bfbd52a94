"""Whose forward pass is next on the device that computes vectors, and on which thread."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")
# Of 19 steps that a thread's priority can go down. Engines get three times its time. With more steps it would stand
# still while it holds the interpreter, which queries then wait for.
_BEHIND = 5


class Passes(Protocol):
    """Runs forward passes for several threads."""

    @property
    def is_wanted(self) -> bool:
        """Whether a pass of documents would keep others waiting."""
        ...

    def run(self, forward: Callable[[], Result], *, is_query: bool) -> Result:
        """What ``forward`` computes."""
        ...


class DeviceTurns:
    """One forward pass at a time: several would share the device and add up in memory. Threads take turns.

    A turn is for a pass and not for a call, and a query goes before documents. So a query waits for the pass under way,
    however many documents are being read. Documents are read between two queries.
    """

    def __init__(self, call: Callable[[Callable[[], Any]], Any] = lambda forward: forward()) -> None:
        """``call`` calls a pass on the thread where passes must run."""
        self._call = call
        self._changed = threading.Condition()
        self._is_taken, self._num_queries, self._num_waiting = False, 0, 0

    @property
    def is_wanted(self) -> bool:
        return self._is_taken or self._num_waiting > 0

    def run(self, forward: Callable[[], Result], *, is_query: bool) -> Result:
        with self.turn(is_query=is_query):
            computed: Result = self._call(forward)
            return computed

    @contextmanager
    def turn(self, *, is_query: bool) -> Iterator[None]:
        """Holds the device for the block."""
        with self._changed:
            self._num_queries, self._num_waiting = self._num_queries + is_query, self._num_waiting + 1
            self._changed.wait_for(lambda: not self._is_taken and (is_query or not self._num_queries))
            self._num_queries, self._num_waiting = self._num_queries - is_query, self._num_waiting - 1
            self._is_taken = True
        try:
            yield
        finally:
            with self._changed:
                self._is_taken = False
                self._changed.notify_all()


class DocumentsBehind:
    """Passes on cores that others compute on, who go first: documents on a thread of less priority.

    Where the cores are full that thread is slow within a pass. So a query does not wait for its turn: it has a thread
    of its own, of usual priority. Each has one, since every thread that computes has helpers of its own.
    """

    def __init__(self) -> None:
        self._documents = ThreadPoolExecutor(1, "documents", initializer=_step_back)
        self._queries = ThreadPoolExecutor(1, "queries")

    @property
    def is_wanted(self) -> bool:
        return False  # a query waits for no document, and documents wait for each other's passes of any size

    def run(self, forward: Callable[[], Result], *, is_query: bool) -> Result:
        return (self._queries if is_query else self._documents).submit(forward).result()


def _step_back() -> None:
    if sys.platform == "linux":  # elsewhere this is the whole process's
        os.nice(_BEHIND)
