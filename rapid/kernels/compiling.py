"""Counts the kernels that this process compiles. A pass that compiles one takes as long as the compiler does."""

from __future__ import annotations

import itertools
from typing import Any

_started = itertools.count(1)
_num_started = 0


def begins(*_: Any, **__: Any) -> None:
    """A compiler starts. The arguments are those of Triton's hooks."""
    global _num_started
    _num_started = next(_started)


def num_started() -> int:
    """How many kernels have been compiled, or are being compiled now, by any thread."""
    return _num_started
