"""Moments in a device's work, and the time between two of them.

An engine's thread hands work to a GPU and goes on, so the host's clock would measure how long that took and not the
work. There a moment is an event in the device's stream.
"""

from __future__ import annotations

import time

import torch

from rapid.kernels.transfer import is_asynchronous


class Moment:
    """The moment when ``device`` has done all that the calling thread has given it so far."""

    def __init__(self, device: torch.device) -> None:
        self._at: float | torch.cuda.Event
        if is_asynchronous(device):
            self._at = torch.cuda.Event(enable_timing=True)
            self._at.record(torch.cuda.current_stream(device))
        else:
            self._at = time.perf_counter()

    def ms_until(self, later: Moment) -> float:
        """Milliseconds from this moment to ``later``, on the same device.

        The host must have downloaded something that was computed after ``later``: this call does not wait.
        """
        if isinstance(self._at, float) or isinstance(later._at, float):
            assert isinstance(self._at, float) and isinstance(later._at, float)
            return (later._at - self._at) * 1e3
        return float(self._at.elapsed_time(later._at))
