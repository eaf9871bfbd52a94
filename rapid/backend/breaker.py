"""Keeps requests from waiting, one after another, for a part that does not answer."""

from __future__ import annotations

import time

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 15.0  # between two requests that try again
_TRY_S = 5.0  # while one tries, the others do without


class Breaker:
    """For one part (``name``) that requests can do without. One request waits in vain, and the next ones do not wait.

    After `failed` the breaker is open, and `refusal` gives the reason. After a pause, which doubles from failure to
    failure, it lets one request through; `succeeded` closes it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pause_s = 0.0  # 0 while closed
        self._next_try = 0.0

    def refusal(self) -> str | None:
        """Why the caller must not ask now; None if it may."""
        if not self._pause_s:
            return None
        now = time.monotonic()
        if now < self._next_try:
            return f"{self._name} did not answer lately; it is asked again in {self._next_try - now:.1f} s"
        self._next_try = now + _TRY_S
        return None

    def failed(self) -> None:
        """The part was asked, and did not answer in time."""
        self._pause_s = min(max(FIRST_PAUSE_S, 2 * self._pause_s), LONGEST_PAUSE_S)
        self._next_try = time.monotonic() + self._pause_s

    def succeeded(self) -> None:
        self._pause_s = 0.0
