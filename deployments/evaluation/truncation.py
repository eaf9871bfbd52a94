"""Cuts what is too long: the middle of a prompt, as the benchmarks do, or a document into parts that fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

from deployments.evaluation.task import ChatMessage, Tokenizer


class Prompt(NamedTuple):
    """One user message with a document in it; ``whole`` is the document if some of it was cut off, else ""."""

    messages: tuple[ChatMessage, ...]
    whole: str


def prompt(before: str, document: str, behind: str, tokenizer: Tokenizer, limit: int) -> Prompt:
    """``before`` + ``document`` + ``behind``, of which the middle is cut out where it is above ``limit`` tokens."""
    asked = before + document + behind
    text = without_middle(asked, tokenizer, limit)
    return Prompt(({"role": "user", "content": text},), "" if text == asked else document)


def without_middle(text: str, tokenizer: Tokenizer, limit: int) -> str:
    """The first and the last ``limit`` ÷ 2 tokens of ``text``, decoded together, as LongBench and ∞Bench do."""
    tokens = tokenizer.encode(text)
    if len(tokens) <= limit:
        return text
    kept = limit // 2
    return tokenizer.decode([*tokens[:kept], *tokens[len(tokens) - (limit - kept) :]])


def most(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in ``low``..``high`` that ``fits``, of numbers of which all below one that fits do too.

    It is ``low`` where none fits. Only numbers up to about twice the result are tried, because trying may take long.
    """
    step = 1
    while low + step <= high and fits(low + step):
        low, step = low + step, 2 * step
    high = min(high, low + step - 1)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


class Document:
    """A document in pieces, such as paragraphs, of which a run is read where all of it is too long."""

    def __init__(self, pieces: Sequence[str], joiner: str, tokenizer: Tokenizer) -> None:
        self.pieces, self.joiner = pieces, joiner
        self.text = joiner.join(pieces)
        self._tokenizer = tokenizer
        self._parts: dict[int, list[range]] = {}

    def part_with(self, evidence: Sequence[int], room: int) -> range:
        """The first of the document's parts of ``room`` tokens that has the most of the pieces of ``evidence``.

        Questions whose evidence is near one another thus read the same part.
        """
        if room not in self._parts:
            self._parts[room] = parts(self._sizes, room)
        return max(self._parts[room], key=lambda part: sum(piece in part for piece in evidence))

    def read(self, part: range) -> str:
        """The text of ``part``."""
        return self.joiner.join(self.pieces[part.start : part.stop])

    @cached_property
    def _sizes(self) -> list[int]:
        # The joiner stands before the piece, as it does in the text: at an end two line feeds may be one token, and
        # between texts two. A part would then be too long, and each question about it would be cut elsewhere.
        return [len(self._tokenizer.encode(self.joiner + piece)) for piece in self.pieces]


def evidence_kept(texts: Sequence[str], prompt: str) -> str:
    """Whether "all", "some" or "none" of the ``texts`` are in ``prompt``; "unknown" where there are none."""
    kept = sum(text in prompt for text in texts)
    return "unknown" if not texts else "all" if kept == len(texts) else "some" if kept else "none"


def parts(sizes: Sequence[int], room: int) -> list[range]:
    """Runs of pieces with ``sizes`` tokens that fit into ``room``, each beginning in the middle of the one before.

    So what is shorter than half a part is whole in one of them. A piece above ``room`` is a part of its own.
    """
    found: list[range] = []
    start = 0
    while start < len(sizes):
        end, filled = start + 1, sizes[start]
        while end < len(sizes) and filled + sizes[end] <= room:
            filled += sizes[end]
            end += 1
        found.append(range(start, end))
        if end == len(sizes):
            break
        half, start = filled / 2 - sizes[start], start + 1
        while start < end and half > 0:
            half -= sizes[start]
            start += 1
    return found
