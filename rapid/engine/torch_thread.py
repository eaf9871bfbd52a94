"""The one thread of a process in which PyTorch computes.

OpenMP gives every thread that calls it a team of its own, and once the teams of a process have more members than there
are cores, their members hardly spin between operators any more but sleep, which a decode step of hundreds of short
operators pays for each time. So models load, engines step and embedders embed here, in turns, as they would anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_THREAD = ThreadPoolExecutor(1, "compute")


def compute(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls ``function`` on the thread, and returns what it returns or raises what it raises. Not reentrant."""
    return _THREAD.submit(function, *args, **kwargs).result()
