"""Natural Questions with the gold passage among other questions' passages, at a chosen depth, or without it.

Source: Liu et al., "Lost in the Middle", 2023: its file of gold passages, its prompt and its metric.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from deployments.evaluation.metrics.answers import contains_any, exact_match, f1
from deployments.evaluation.reading import Source, find, records
from deployments.evaluation.task import OPTIONS, EvaluationError, Question, Task, TaskSettings, Tokenizer, chosen
from deployments.evaluation.truncation import prompt

SOURCE = Source(("nq_open_oracle.jsonl.gz", "nq-open-oracle.jsonl.gz", "nq_open_oracle.jsonl"))
CONTEXT_TOKENS = 128_000
MAX_TOKENS = 100
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_BEFORE = (
    "Write a high-quality answer for the given question using only the provided search results (some of which might be "
    "irrelevant).\n\n"
)
_SLACK_TOKENS = 8  # a prompt may have more tokens than its pieces have together


class _Asked(NamedTuple):
    id: str
    question: str
    answers: tuple[str, ...]
    title: str
    text: str  # of the gold passage


@dataclass(config=OPTIONS)
class NaturalQuestions(Task):
    """Whether an answer contains a reference, F1 and exact match, among as many passages as fit.

    ``depth`` is where the gold passage stands: 0 at the beginning, 1 at the end; "each": the questions go round 0,
    0.25, 0.5, 0.75 and 1; "absent": nowhere; "shared": many questions share a document, which has the gold passages of
    all.
    """

    name: str = "nq"
    depth: Literal["each", "shared", "absent"] | Annotated[float, Field(ge=0, le=1)] = "each"
    metric = "match"

    def questions(self, settings: TaskSettings) -> Iterator[Question]:
        asked = _read(find(SOURCE, self.name, settings))
        size = _Sizes(settings.tokenizer)
        room = (settings.context_tokens or CONTEXT_TOKENS) - len(settings.tokenizer.encode(_BEFORE)) - _SLACK_TOKENS
        if self.depth == "shared":
            yield from self._shared(asked, size, room, settings)
            return
        for one in chosen(asked, lambda one: one.id, settings):
            depth = DEPTHS[int(one.id) % len(DEPTHS)] if self.depth == "each" else self.depth
            yield self._among_others(one, depth, asked, size, room, settings)

    def score(self, question: Question, answer: str) -> dict[str, float]:
        return {
            "match": contains_any(answer, question.references),
            "f1": f1(answer, question.references),
            "exact_match": exact_match(answer, question.references),
        }

    def _among_others(
        self, one: _Asked, depth: float | str, asked: list[_Asked], size: _Sizes, room: int, settings: TaskSettings
    ) -> Question:
        room -= size.of_question(one) + (0 if depth == "absent" else size.of_passage(one))
        passages: list[_Asked] = []
        for other in random.Random(f"{settings.seed}/{one.id}").sample(asked, len(asked)):
            if other.title == one.title or contains_any(other.text, one.answers):
                continue
            room -= size.of_passage(other)
            if room < 0:
                break
            passages.append(other)
        if isinstance(depth, float):
            passages.insert(round(depth * len(passages)), one)
        return self._question(one, passages, str(depth) if depth == "absent" else f"depth {depth:g}", settings)

    def _shared(self, asked: list[_Asked], size: _Sizes, room: int, settings: TaskSettings) -> Iterator[Question]:
        """Each document is filled with the next passages of a drawn order, and asked about all of them."""
        drawn = random.Random(settings.seed).sample(asked, len(asked))
        left = len(drawn) if settings.limit is None else min(settings.limit, len(drawn))
        start = 0
        while left > 0:
            end, filled, frame = start, 0, 0
            while end < len(drawn):
                filled += size.of_passage(drawn[end])
                frame = max(frame, size.of_question(drawn[end]))
                if filled + frame > room and end > start:
                    break
                end += 1
            passages = drawn[start:end]
            for i, one in enumerate(passages[:left]):
                yield self._question(one, passages, f"fifth {5 * i // len(passages) + 1} of 5", settings, str(start))
            left -= len(passages)
            start = end

    def _question(
        self, one: _Asked, passages: list[_Asked], group: str, settings: TaskSettings, document: str = ""
    ) -> Question:
        shown = "\n".join(_shown(i, other) for i, other in enumerate(passages, start=1))
        made = prompt(_BEFORE, shown, _behind(one), settings.tokenizer, settings.context_tokens or CONTEXT_TOKENS)
        return Question(
            id=one.id,
            messages=made.messages,
            references=one.answers,
            max_tokens=MAX_TOKENS,
            query=one.question,
            whole=made.whole,
            document=document,
            group=group,
            facts={"gold": {"title": one.title, "text": one.text}, "passages": len(passages)},
        )


class _Sizes:
    """How many tokens a passage and a question have, each counted once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, int] = {}

    def of_passage(self, one: _Asked) -> int:
        return self._of(_shown(100, one) + "\n")

    def of_question(self, one: _Asked) -> int:
        return self._of(_behind(one))

    def _of(self, text: str) -> int:
        if text not in self._known:
            self._known[text] = len(self._tokenizer.encode(text))
        return self._known[text]


def _shown(number: int, one: _Asked) -> str:
    return f"Document [{number}](Title: {one.title}) {one.text}"


def _behind(one: _Asked) -> str:
    return f"\n\nQuestion: {one.question}\nAnswer:"


def _read(path: Path) -> list[_Asked]:
    asked: list[_Asked] = []
    for i, row in enumerate(records(path, ("question", "answers", "ctxs"))):
        gold = next((one for one in row["ctxs"] if one.get("isgold")), None)
        if gold is None:
            raise EvaluationError(f"{path}, record {i + 1}: none of its ctxs is gold")
        asked.append(_Asked(str(i), row["question"], tuple(row["answers"]), gold["title"], gold["text"]))
    return asked
