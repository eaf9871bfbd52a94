"""How much of its time a piece of work has left, which it spends in several places."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TimeLeft:
    """`seconds` that are left."""

    seconds: float
