"""How long the engine's current pass has been running, for whoever looks from another thread."""

from __future__ import annotations

import time

from rapid.engine.messages import Pulse
from rapid.kernels import compiling

_WARM = 8  # the first turns load what they need, and say nothing about later ones


class PassClock:
    """Times an engine's turns. One is under way at a time, and any thread may read `pulse`.

    A turn is the tasks' own work and its forward passes: on a GPU a pass only starts the kernels, and the task that
    reads the result is what waits for them. It begins when it is asked for, since what had the compute thread before
    may hang.
    """

    def __init__(self) -> None:
        self._began: float | None = None
        self._expected_s: float | None = None
        self._compiled = compiling.num_started()
        self._count = 0

    def begin(self) -> None:
        """A turn is asked for."""
        self._compiled, self._began = compiling.num_started(), time.monotonic()

    def end(self) -> None:
        """The turn is over."""
        self._began = None
        self._count += 1

    def begin_pass(self, expected_s: float | None) -> None:
        """A pass begins, in the current turn, that is expected to take that long (None: nobody knows)."""
        self._expected_s, self._began = expected_s, time.monotonic()

    @property
    def has_compiled(self) -> bool:
        """Whether kernels have been compiled since the current turn began."""
        return self._compiled != compiling.num_started()

    def pulse(self) -> Pulse:
        """The age of the current pass, and its expected time unless it is among the first, or compiles kernels."""
        began = self._began
        age_s = time.monotonic() - began if began is not None else 0.0
        is_usual = self._count >= _WARM and not self.has_compiled
        return Pulse(age_s, self._expected_s if is_usual else None)
