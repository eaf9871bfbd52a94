"""Taking turns at the device that computes vectors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class DeviceTurns:
    """One forward pass at a time: several would share the device and add up in memory. Threads take turns.

    A turn is for a pass and not for a call, and a query goes before documents. So a query waits for the pass under way,
    however many documents are being read. Documents are read between two queries.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_taken, self._num_queries, self._num_waiting = False, 0, 0

    @property
    def is_wanted(self) -> bool:
        """Whether another thread has the device or waits for it; asked by one that has no turn."""
        return self._is_taken or self._num_waiting > 0

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
