"""How long the engine's current iteration has been running, for whoever looks from another thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from rapid.engine.messages import Pulse

_REMEMBERED = 256  # iterations
_WARM = 8  # iterations after which the longest of them says something about the next


class PassClock:
    """Times iterations. One thread runs them, and any thread may read `pulse`.

    An iteration is the tasks' own work and one forward pass: on a GPU the pass only starts the kernels, and the task
    that reads the result is what waits for them.
    """

    def __init__(self) -> None:
        self._began: float | None = None
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Times the block as one iteration."""
        began = self._began = time.monotonic()
        try:
            yield
        finally:
            self._began = None
            self._durations.append(time.monotonic() - began)

    def pulse(self) -> Pulse:
        """The age of the current iteration, and the longest of those before it."""
        began, durations = self._began, list(self._durations)
        age_s = time.monotonic() - began if began is not None else 0.0
        return Pulse(age_s, max(durations) if len(durations) >= _WARM else None)
