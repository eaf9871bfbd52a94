"""How long the engine's current pass has been running, for whoever looks from another thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rapid.engine.messages import Pulse
from rapid.kernels import compiling

_WARM = 8  # the first iterations load what they need, and say nothing about later ones


class PassClock:
    """Times iterations. One thread runs them, and any thread may read `pulse`.

    An iteration is the tasks' own work and one forward pass: on a GPU the pass only starts the kernels, and the task
    that reads the result is what waits for them.
    """

    def __init__(self) -> None:
        self._began: float | None = None
        self._expected_s: float | None = None
        self._compiled = compiling.num_started()
        self._count = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Times the block as one iteration."""
        self._compiled, self._began = compiling.num_started(), time.monotonic()
        try:
            yield
        finally:
            self._began = None
            self._count += 1

    def begin_pass(self, expected_s: float | None) -> None:
        """A pass begins, in the current iteration, that is expected to take that long (None: nobody knows)."""
        self._expected_s, self._began = expected_s, time.monotonic()

    @property
    def has_compiled(self) -> bool:
        """Whether kernels have been compiled since the current iteration began."""
        return self._compiled != compiling.num_started()

    def pulse(self) -> Pulse:
        """The age of the current pass, and its expected time unless it is among the first, or compiles kernels."""
        began = self._began
        age_s = time.monotonic() - began if began is not None else 0.0
        is_usual = self._count >= _WARM and not self.has_compiled
        return Pulse(age_s, self._expected_s if is_usual else None)
