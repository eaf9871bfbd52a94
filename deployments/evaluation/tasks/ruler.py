"""RULER, made here at any length: what its thirteen tasks have in common, and its eight needles in a haystack.

The answer's beginning, with which RULER prompts base models, stands at the end of the question. Words come from
`ruler_words`, and the essay is any text that is given. Source: Hsieh et al., "RULER", 2024, and its `constants.py`,
`synthetic.yaml` and `niah.py`.
"""

from __future__ import annotations

import random
import re
import uuid
from abc import abstractmethod
from collections.abc import Iterator
from functools import cache
from typing import Literal, NamedTuple

from pydantic.dataclasses import dataclass

from deployments.evaluation.metrics.matching import share_contained
from deployments.evaluation.reading import Source, find, text
from deployments.evaluation.task import OPTIONS, EvaluationError, Question, Task, TaskSettings
from deployments.evaluation.tasks.ruler_words import pairs
from deployments.evaluation.truncation import most

CONTEXT_TOKENS = 4_096  # the shortest of the benchmark's lengths
QUESTIONS = 500  # that are made where no limit is given
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ESSAY = Source(("essay.txt", "*.txt"))


class Sample(NamedTuple):
    """A prompt in three parts, and every text that a right answer contains."""

    before: str
    context: str
    behind: str
    query: str
    outputs: list[str]

    @property
    def prompt(self) -> str:
        return self.before + self.context + self.behind


class Ruler(Task):
    """A task whose samples are made of as many pieces as fit: prompt and answer have ``context_tokens`` together."""

    metric = "match"
    max_tokens: int

    @abstractmethod
    def make(self, i: int, generator: random.Random, size: int) -> Sample:
        """The ``i``-th sample, with ``size`` pieces."""

    def prepare(self, settings: TaskSettings) -> None:
        """Reads the data before the first sample."""

    def sizes(self, limit: int) -> tuple[int, int]:
        """The fewest pieces that make a sample, and the most that ``limit`` tokens may hold."""
        return 1, limit

    def questions(self, settings: TaskSettings) -> Iterator[Question]:
        self.prepare(settings)
        limit = (settings.context_tokens or CONTEXT_TOKENS) - self.max_tokens

        def sample(i: int, size: int) -> Sample:
            return self.make(i, random.Random(f"{settings.seed}/{self.name}/{i}"), size)

        def fits(made: Sample) -> bool:
            return len(settings.tokenizer.encode(made.prompt)) <= limit

        fewest, high = self.sizes(limit)
        size = most(lambda size: fits(sample(0, size)), fewest, max(fewest, high))
        for i in range(QUESTIONS if settings.limit is None else settings.limit):
            made, used = sample(i, size), size
            while not fits(made) and used > fewest:
                used = max(fewest, min(used - 1, used * 49 // 50))
                made = sample(i, used)
            if not fits(made):
                raise EvaluationError(f"task {self.name}: {limit} tokens are too few for it; give more context tokens")
            yield Question(
                id=str(i),
                messages=({"role": "user", "content": made.prompt},),
                references=tuple(made.outputs),
                max_tokens=self.max_tokens,
                query=made.query,
                facts={"pieces": used},
            )

    def score(self, question: Question, answer: str) -> dict[str, float]:
        return {"match": share_contained(answer, question.references)}


@dataclass(config=OPTIONS)
class Needles(Ruler):
    """Values hidden under keys: "niah". ``keys`` and ``values`` are how many are hidden, ``queries`` how many asked.

    The haystack is noise, an essay, or other needles.
    """

    name: str
    haystack: Literal["noise", "essay", "needles"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    max_tokens = 128

    def sizes(self, limit: int) -> tuple[int, int]:
        return self.keys * self.values, limit

    def prepare(self, settings: TaskSettings) -> None:
        if self.haystack == "essay":
            content = text(find(ESSAY, self.name, settings))
            self._words = content.split()
            if not self._words:
                raise EvaluationError(f"task {self.name}: its essay is empty")

    def make(self, i: int, generator: random.Random, size: int) -> Sample:
        hidden = {_drawn(generator, self.key): self._drawn_values(generator) for _ in range(self.keys)}
        needles = [self._needle(key, value) for key, values in hidden.items() for value in values]
        generator.shuffle(needles)
        asked = generator.sample(list(hidden), self.queries)
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        frame = self._frame(query)
        return Sample(
            frame[0] + "\n",
            self._context(generator, size, needles),
            f"\n{frame[1]} {frame[2]}",
            frame[1],
            [value for key in asked for value in hidden[key]],
        )

    def _frame(self, query: str) -> tuple[str, str, str]:
        if self.queries * self.values == 1:
            kind = self.value[:-1]
            return (
                f"A special magic {kind} is hidden within the following text. Make sure to memorize it. "
                f"I will quiz you about the {kind} afterwards.",
                f"What is the special magic {kind} for {query} mentioned in the provided text?",
                f"The special magic {kind} for {query} mentioned in the provided text is",
            )
        kind = self.value
        return (
            f"Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards.",
            f"What are all the special magic {kind} for {query} mentioned in the provided text?",
            f"The special magic {kind} for {query} mentioned in the provided text are",
        )

    def _context(self, generator: random.Random, size: int, needles: list[str]) -> str:
        """``size`` words of an essay, or lines of noise or other needles, with the needles between them."""
        if self.haystack == "essay":
            repeated = self._words * (size // len(self._words) + 1)
            sentences = re.split(r"(?<=[.!?]) ", " ".join(repeated[:size]))
            depths = sorted(generator.sample([round(i * 100 / 39) for i in range(40)], len(needles)))
            for depth, needle in reversed(list(zip(depths, needles, strict=True))):
                sentences.insert(len(sentences) * depth // 100, needle)
            return " ".join(sentences)
        lines = [NOISE] * size
        if self.haystack == "needles":
            lines = [self._needle(_drawn(generator, self.key), _drawn(generator, self.value)) for _ in range(size)]
        at = sorted(generator.sample(range(size), len(needles)), reverse=True)
        for i, needle in zip(at, needles, strict=True):
            lines.insert(i, needle)
        return "\n".join(lines)

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value} for {key} is: {value}."

    def _drawn_values(self, generator: random.Random) -> list[str]:
        return [_drawn(generator, self.value) for _ in range(self.values)]


def _drawn(generator: random.Random, kind: str) -> str:
    if kind == "numbers":
        return str(generator.randint(10**6, 10**7 - 1))
    if kind == "words":
        return generator.choice(_pairs())
    return str(uuid.UUID(int=generator.getrandbits(128), version=4))


@cache
def _pairs() -> list[str]:
    return pairs()
