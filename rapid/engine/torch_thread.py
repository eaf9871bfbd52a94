"""The one thread of a process in which PyTorch computes.

OpenMP gives every calling thread a team of worker threads. If the teams of a process have more members than there are
cores, the members sleep between operators and hardly spin. A decode step has hundreds of short operators, and each one
then pays for waking them. So models load, engines step and embedders embed on this one thread, in turns; they would
share the cores in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_THREAD = ThreadPoolExecutor(1, "compute")


def compute(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls ``function`` on the thread; returns its result, or raises its exception. Not reentrant."""
    return _THREAD.submit(function, *args, **kwargs).result()


def soon(function: Callable[[], None]) -> None:
    """Calls ``function``, which raises nothing, on the thread: after what was asked for before, and without waiting."""
    _THREAD.submit(function)
