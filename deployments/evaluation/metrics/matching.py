"""Answers found in a text: RULER's substrings, ∞Bench's numbers and keys, and the letters of multiple choice."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LETTER = re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])")
_CONTROLS = re.compile(r"[\x00-\x1f]")
_NUMBER = re.compile(r"[0-9]+")


def share_contained(answer: str, references: Sequence[str]) -> float:
    """The share of ``references`` that stand in ``answer``, whatever their case (RULER's `string_match_all`)."""
    text = _without_controls(answer)
    return sum(reference.lower() in text for reference in references) / len(references)


def any_contained(answer: str, references: Sequence[str]) -> float:
    """1 if one of ``references`` stands in ``answer``, whatever its case, else 0 (RULER's `string_match_part`)."""
    text = _without_controls(answer)
    return float(any(reference.lower() in text for reference in references))


def correct_letter(answer: str) -> str | None:
    """The letter that ``answer`` names as LongBench v2 asks for it; None: it names none, and counts as wrong."""
    found = (pattern.search(answer.replace("*", "")) for pattern in _LETTER)
    return next((match[1] for match in found if match), None)


def chooses(answer: str, letter: str, text: str) -> bool:
    """Whether ``answer`` chooses the option ``letter`` with ``text``, as ∞Bench's En.MC reads it.

    The answer's first character counts if it is one of A to D; else the option's whole text; else what follows
    "answer is:", "answer:", "answer is" or "option is"; else the first word that is a part of "ABCD".
    """
    answer = answer.strip()
    if not answer:
        return False
    if answer[0] in "ABCD":
        return answer[0] == letter
    if answer == text:
        return True
    answer = re.sub(" +", " ", re.sub(r"[\n\"'.,?!{}]", " ", answer))
    for prefix in ("answer is:", "answer:", "answer is", "option is"):
        if (start := answer.find(prefix)) >= 0:
            # The benchmark skips one more character, which is the space.
            return answer[start + len(prefix) + 1 :].startswith((letter, text))
    first = next((word for word in answer.split() if word in "ABCD"), None)
    return first in (letter, text)


def first_number(answer: str) -> str:
    """The first run of digits in ``answer``, as ∞Bench reads a pass key; "" if there is none."""
    found = _NUMBER.search(answer)
    return found[0] if found else ""


def names_word(answer: str, word: str) -> bool:
    """Whether ``word`` is one of the words of ``answer`` without punctuation, as ∞Bench reads a value."""
    return word in re.sub(r"[\n:\"'.,?!{}]", " ", answer).split()


def _without_controls(answer: str) -> str:
    """``answer`` in lower case, with lines for control characters, as RULER prepares it."""
    return _CONTROLS.sub("\n", answer.strip()).strip().lower()
