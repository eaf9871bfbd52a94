"""What a task is to the rest of an evaluation: questions, and what an answer to each is worth.

A task reads its data, truncates as its benchmark does, and scores. It knows nothing of models, strategies and servers.
`deployments.evaluation.tasks` has them by name.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from pydantic import ConfigDict

ChatMessage = Mapping[str, str]  # role and content, as in OpenAI's API

# Tasks are pydantic's dataclasses, whose fields are the task's options: they come as text, and one that is unknown is
# refused.
OPTIONS = ConfigDict(extra="forbid")


class EvaluationError(Exception):
    """An evaluation cannot be done as it was asked for: the message says what is wrong, where, and what to do."""


class Tokenizer(Protocol):
    """The target's tokenizer, as far as truncation needs it. Special tokens are neither added nor read."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class TaskSettings:
    """What is asked of every task.

    Attributes:
        tokenizer: the target's; prompts are truncated in its tokens.
        data: the task's file in its benchmark's own format, or a folder in which it has its usual name. None: none.
        from_hub: whether a task without a file may download its data from the hub.
        context_tokens: the most tokens of a prompt, before the chat template. None: as many as the benchmark says.
        limit: the most questions. Which, ``seed`` says; those of a lower limit are among those of a higher one.
        seed: of everything that is drawn at random: the questions, and what a task generates.
    """

    tokenizer: Tokenizer
    data: Path | None = None
    from_hub: bool = False
    context_tokens: int | None = None
    limit: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class FollowUp:
    """A second call, whose answer is the one that is scored: ``messages`` makes its prompt of the first answer."""

    messages: Callable[[str], tuple[ChatMessage, ...]]
    max_tokens: int


@dataclass(frozen=True)
class Question:
    """One question as a model is asked it.

    Attributes:
        id: unique in its task. It does not depend on ``limit``; what it stands for depends on the task's options, the
            seed and ``context_tokens``.
        messages: the chat, with the document in it, truncated already.
        references: right answers, any of which will do unless the metric says otherwise; empty when there is none.
        max_tokens: of the answer.
        query: what is asked, without document and instructions.
        whole: the document before truncation, for a drafter that retrieves from all of it; "" if nothing was cut off.
        document: names the document. Questions with the same one stand in a row, so that a cache can serve them.
        choices: the options of multiple choice, in the order of the letters.
        group: for tables by group: a difficulty, a language, whether the evidence was kept.
        item: questions of one item count once in the task's mean (the turns of a dialogue); "" if it stands for itself.
        facts: what a report shows beside it, as JSON: the gold passage, the evidence.
        then: the second call, where the benchmark has one.
    """

    id: str
    messages: tuple[ChatMessage, ...]
    references: tuple[str, ...]
    max_tokens: int
    query: str = ""
    whole: str = ""
    document: str = ""
    choices: tuple[str, ...] = ()
    group: str = ""
    item: str = ""
    facts: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    then: FollowUp | None = None


class Judge(Protocol):
    """How another model rates the answers of a task."""

    max_tokens: int

    def messages(self, question: Question, answer: str) -> tuple[ChatMessage, ...]:
        """What the judge is asked."""

    def scores(self, verdict: str) -> dict[str, float]:
        """
        Raises:
            ValueError: the verdict contains no rating. It is then missing, not zero.
        """


class Task(ABC):
    """One benchmark, or one of its parts.

    Attributes:
        name: unique among the tasks of a run.
        metric: the main one, a key of what ``score`` or the judge's ``scores`` return.
        best: the main metric's best value: 1, of which tables show percents, or 10.
        judge: who gives the main metric, where ``score`` cannot. Then ``score`` has only lesser ones, or none.
    """

    name: str
    metric: str
    best: float = 1.0
    judge: Judge | None = None

    @abstractmethod
    def questions(self, settings: TaskSettings) -> Iterable[Question]:
        """
        Raises:
            EvaluationError: there is no data, or it is not in the benchmark's format.
        """

    @abstractmethod
    def score(self, question: Question, answer: str) -> dict[str, float]:
        """Each metric's value for ``answer``, the last call's."""

    def combine(self, scores: Sequence[float]) -> float:
        """One value of the main metric for the questions of one item."""
        return sum(scores) / len(scores)


T = TypeVar("T")


def chosen(records: Sequence[T], identity: Callable[[T], str], settings: TaskSettings) -> list[T]:
    """The records that ``settings`` ask for, in their order: ``limit`` of them, drawn by ``seed``."""
    if settings.limit is None or settings.limit >= len(records):
        return list(records)
    drawn = sorted(range(len(records)), key=lambda i: _lot(settings.seed, identity(records[i])))
    return [records[i] for i in sorted(drawn[: settings.limit])]


def _lot(seed: int, identity: str) -> bytes:
    return hashlib.sha256(f"{seed}/{identity}".encode()).digest()
