"""What a judge said: a rating from 1 to 10, or yes and no."""

from __future__ import annotations

import re

_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_SINGLE = re.compile(r"\[\s*(\d+(?:\.\d+)?)\s*\]")
_WORD = re.compile(r"\b(true|false)\b", re.IGNORECASE)


def rating(verdict: str) -> float:
    """The rating in 1..10 that ``verdict`` ends with, written as [[7]]; as [7] if nothing is written that way.

    MT-Bench-101's own reader takes the first; the last one is what follows the explanation that the judge is asked for.

    Raises:
        ValueError: there is none, or it is not in 1..10.
    """
    found = _RATING.findall(verdict) or _SINGLE.findall(verdict)
    if not found:
        raise ValueError("the judge's verdict has no rating such as [[7]]")
    value = float(found[-1])
    if not 1 <= value <= 10:
        raise ValueError(f"the judge's rating is {value:g}; it must be from 1 to 10")
    return value


def is_true(verdict: str) -> bool:
    """Whether the first "true" or "false" of ``verdict`` is "true".

    Raises:
        ValueError: there is neither.
    """
    found = _WORD.search(verdict)
    if found is None:
        raise ValueError("the judge's verdict is neither True nor False")
    return found[1].lower() == "true"
