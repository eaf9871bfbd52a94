"""Keeps requests from waiting, one after another, for a part that does not answer."""

from __future__ import annotations

import time

from rapid.errors import Overloaded, RapidError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 15.0  # between two requests that try again
_TRY_S = 5.0  # while one tries, the others do without


class Breaker:
    """For a part that requests can do without: one request waits in vain, and the next ones do not wait.

    After `failed` the breaker is open, and `refusal` gives the error at once. After a pause it lets one request
    through; `succeeded` closes it. The pause doubles from failure to failure, but not where there was no place: one may
    come free at any moment, and replicas that are started on demand go away again if nobody asks for them.
    """

    def __init__(self) -> None:
        self._error: RapidError | None = None  # while open
        self._pause_s = self._next_try = 0.0
        self._is_trying = False

    @property
    def is_open(self) -> bool:
        """Whether the latest answer that was waited for did not come."""
        return self._error is not None

    def refusal(self) -> RapidError | None:
        """The latest failure, for a caller that must not ask now; None if it may."""
        if self._error is None:
            return None
        now = time.monotonic()
        if now >= self._next_try:
            self._next_try, self._is_trying = now + _TRY_S, True
            return None
        again = f"{self._error.message}; it is asked again in {self._next_try - now:.1f} s"
        return type(self._error)(again, code=self._error.code, status=self._error.status)

    def failed(self, error: RapidError) -> None:
        """The part was asked, and did not answer in time."""
        if self._error is not None and not self._is_trying:
            return  # of a request that began to wait before the breaker opened
        self._error, self._is_trying = error, False
        longest_s = FIRST_PAUSE_S if isinstance(error, Overloaded) else LONGEST_PAUSE_S
        self._pause_s = min(max(FIRST_PAUSE_S, 2 * self._pause_s), longest_s)
        self._next_try = time.monotonic() + self._pause_s

    def succeeded(self) -> None:
        self._error, self._pause_s, self._is_trying = None, 0.0, False
