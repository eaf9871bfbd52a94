"""Whose forward pass is next on the device that computes vectors, and on which thread."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")


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


class OneThreadEach:
    """Passes on cores that others compute on: a query's, a document's, and a document's of a thread that stands behind.

    Each has a thread of its own, so that none waits for one that gets no time within its pass, and since every thread
    that computes has helpers of its own.
    """

    def __init__(self) -> None:
        self._queries, self._documents = ThreadPoolExecutor(1, "queries"), ThreadPoolExecutor(1, "documents")
        self._behind = ThreadPoolExecutor(1, "documents-behind", initializer=stand_behind)

    @property
    def is_wanted(self) -> bool:
        return False  # a query waits for no document, and documents wait for each other's passes of any size

    def run(self, forward: Callable[[], Result], *, is_query: bool) -> Result:
        thread = self._queries if is_query else self._behind if stands_behind() else self._documents
        return thread.submit(forward).result()


def stand_behind() -> None:
    """From now on this thread, and each that it starts, computes when no usual thread on the same core wants to.

    A thread of usual priority that wakes up interrupts it at once. Only Linux has this for a single thread, and a
    sandbox may refuse it: then the thread goes on as it is.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def stands_behind() -> bool:
    """Whether this thread has called `stand_behind`."""
    return sys.platform == "linux" and os.sched_getscheduler(0) == os.SCHED_IDLE
