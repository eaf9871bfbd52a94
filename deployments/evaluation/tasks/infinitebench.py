"""∞Bench's questions about whole books: En.QA, En.MC and En.Sum.

Source: Zhang et al., "∞Bench", 2024, and its `prompt.py` (the prompts for open models) and `compute_scores.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic.dataclasses import dataclass

from deployments.evaluation.metrics.answers import f1
from deployments.evaluation.metrics.matching import chooses
from deployments.evaluation.metrics.rouge import rouge_l, rouge_lsum
from deployments.evaluation.reading import Source, as_texts, find, records
from deployments.evaluation.task import OPTIONS, EvaluationError, Question, Task, TaskSettings, chosen
from deployments.evaluation.truncation import prompt

HUB = "xinrongzhang2022/InfiniteBench"
CONTEXT_TOKENS = 127_000
LETTERS = "ABCD"
FIELDS = ("id", "context", "answer")


class _Book(Task):
    """What the three have in common: a file with ``id, context, input, answer`` and a prompt around the book."""

    file: str
    before: str
    max_tokens: int

    def questions(self, settings: TaskSettings) -> Iterable[Question]:
        rows = records(find(Source((self.file,), (HUB, self.file)), self.name, settings), FIELDS)
        return (self._question(row, settings) for row in chosen(rows, lambda row: str(row["id"]), settings))

    def _question(self, row: dict[str, Any], settings: TaskSettings) -> Question:
        query = self._query(row)
        made = prompt(
            self.before,
            row["context"],
            self._behind(row, query),
            settings.tokenizer,
            settings.context_tokens or CONTEXT_TOKENS,
        )
        return Question(
            id=str(row["id"]),
            messages=made.messages,
            references=self._references(row),
            max_tokens=self.max_tokens,
            query=query,
            whole=made.whole,
            choices=tuple(row.get("options") or ()),
        )

    def _query(self, row: dict[str, Any]) -> str:
        return str(row.get("input") or "").strip()

    def _behind(self, row: dict[str, Any], query: str) -> str:
        return f"\n\nQuestion: {query}\nAnswer:"

    def _references(self, row: dict[str, Any]) -> tuple[str, ...]:
        return as_texts(row["answer"])


@dataclass(config=OPTIONS)
class BookQA(_Book):
    """En.QA: 351 questions; token F1."""

    name: str = "infinitebench_qa"
    metric = "f1"
    file = "longbook_qa_eng.jsonl"
    before = "Read the book and answer the question. Be very concise in your answer.\n\n"
    max_tokens = 40

    def score(self, question: Question, answer: str) -> dict[str, float]:
        return {"f1": f1(answer, question.references)}


@dataclass(config=OPTIONS)
class BookChoice(_Book):
    """En.MC: 229 questions with four choices; accuracy. ``references`` are the right option's letter and its text."""

    name: str = "infinitebench_mc"
    metric = "accuracy"
    file = "longbook_choice_eng.jsonl"
    before = "Read the book and answer the question.\n\n"
    max_tokens = 40

    def score(self, question: Question, answer: str) -> dict[str, float]:
        letter, text = question.references
        return {"accuracy": float(chooses(answer, letter, text))}

    def _behind(self, row: dict[str, Any], query: str) -> str:
        options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, self._options(row), strict=True))
        return f"\n\nQuestion: {query}\n{options}\n\nThe letter of the correct answer is"

    def _references(self, row: dict[str, Any]) -> tuple[str, ...]:
        answers, options = as_texts(row["answer"]), self._options(row)
        if len(answers) == 2 and answers[1] in LETTERS:  # the file gives the letter too
            return answers[1], answers[0]
        if answers[0] not in options:
            raise EvaluationError(f"task {self.name}, question {row['id']}: its answer is none of its options")
        return LETTERS[options.index(answers[0])], answers[0]

    def _options(self, row: dict[str, Any]) -> list[str]:
        options = list(as_texts(row.get("options") or []))
        if len(options) != len(LETTERS):
            raise EvaluationError(f"task {self.name}, question {row['id']}: it must have four options")
        return options


@dataclass(config=OPTIONS)
class BookSummary(_Book):
    """En.Sum: 103 summaries; ROUGE-Lsum."""

    name: str = "infinitebench_sum"
    metric = "rouge_lsum"
    file = "longbook_sum_eng.jsonl"
    before = "Summarize the book below.\n\n"
    max_tokens = 1_200

    def score(self, question: Question, answer: str) -> dict[str, float]:
        return {
            "rouge_lsum": rouge_lsum(answer, question.references),
            "rouge_l": rouge_l(answer, question.references),
        }

    def _query(self, row: dict[str, Any]) -> str:
        return "Summarize the book."

    def _behind(self, row: dict[str, Any], query: str) -> str:
        return "\n\nSummary:"
