"""How long the engine's current iteration has been running, for whoever looks from another thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rapid.engine.messages import Pulse

_WARM = 8  # iterations that may compile kernels, and say nothing about later ones
_DECAY = 0.999  # of the longest, per iteration: decoding for long must not make the next prefill look like a hang


class PassClock:
    """Times iterations. One thread runs them, and any thread may read `pulse`.

    An iteration is the tasks' own work and one forward pass: on a GPU the pass only starts the kernels, and the task
    that reads the result is what waits for them.
    """

    def __init__(self) -> None:
        self._began: float | None = None
        self._count, self._longest = 0, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Times the block as one iteration."""
        began = self._began = time.monotonic()
        try:
            yield
        finally:
            self._began = None
            self._count += 1
            if self._count > _WARM:
                self._longest = max(time.monotonic() - began, _DECAY * self._longest)

    def pulse(self) -> Pulse:
        """The age of the current iteration, and the longest of those before it."""
        began = self._began
        age_s = time.monotonic() - began if began is not None else 0.0
        return Pulse(age_s, self._longest or None)
