"""XQuAD in one language, all of its paragraphs joined to one document.

A paragraph is short, so the questions become ones about a long text: where the document is above ``context_tokens``,
each question is asked of a run of paragraphs that has its own. Source of the data: Artetxe et al., "XQuAD", 2019; of
the prompts: LongBench's multifieldqa, 2023; of the metric: SQuAD, by characters in Chinese.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic.dataclasses import dataclass

from deployments.evaluation.metrics.answers import characters, contains_any, exact_match, f1, words
from deployments.evaluation.reading import Source, find, text
from deployments.evaluation.task import OPTIONS, EvaluationError, Question, Task, TaskSettings, chosen
from deployments.evaluation.truncation import Document, prompt

CONTEXT_TOKENS = 64_000
MAX_TOKENS = 64


class _Wording(NamedTuple):
    before: str
    behind: str


_WORDINGS = {
    "en": _Wording(
        "Read the following text and answer briefly.\n\n",
        "\n\nNow, answer the following question based on the above text, only give me the answer and do not output any "
        "other words.\n\nQuestion: {question}\nAnswer:",
    ),
    "zh": _Wording(
        "阅读以下文字并用中文简短回答：\n\n",
        "\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。\n\n问题：{question}\n回答：",
    ),
}


class _Asked(NamedTuple):
    id: str
    question: str
    answers: tuple[str, ...]
    paragraph: int


@dataclass(config=OPTIONS)
class XQuAD(Task):
    """F1 and exact match; ``match``: whether the answer contains a reference."""

    name: str
    language: Literal["en", "zh"]
    metric = "f1"

    def questions(self, settings: TaskSettings) -> Iterator[Question]:
        path = find(Source((f"xquad.{self.language}.json",)), self.name, settings)
        paragraphs, asked = _read(path)
        document = Document(paragraphs, "\n\n", settings.tokenizer)
        limit = settings.context_tokens or CONTEXT_TOKENS
        before, behind = _WORDINGS[self.language]
        frame = max(len(settings.tokenizer.encode(before + behind + one.question)) for one in asked)
        for one in chosen(asked, lambda one: one.id, settings):
            part = document.part_with([one.paragraph], limit - frame)
            asking = behind.replace("{question}", one.question)
            made = prompt(before, document.read(part), asking, settings.tokenizer, limit)
            is_cut = made.whole or len(part) < len(paragraphs)
            yield Question(
                id=one.id,
                messages=made.messages,
                references=one.answers,
                max_tokens=MAX_TOKENS,
                query=one.question,
                whole=document.text if is_cut else "",
                document=str(part.start),
                facts={"gold": {"text": paragraphs[one.paragraph]}},
            )

    def score(self, question: Question, answer: str) -> dict[str, float]:
        tokens = characters if self.language == "zh" else words
        return {
            "f1": f1(answer, question.references, tokens),
            "exact_match": exact_match(answer, question.references, tokens),
            "match": contains_any(answer, question.references, tokens),
        }


def _read(path: Path) -> tuple[list[str], list[_Asked]]:
    """The paragraphs, and what is asked about each."""
    try:
        found: list[dict[str, Any]] = [
            one for article in json.loads(text(path))["data"] for one in article["paragraphs"]
        ]
        return [one["context"] for one in found], [
            _Asked(asked["id"], asked["question"], tuple(answer["text"] for answer in asked["answers"]), i)
            for i, one in enumerate(found)
            for asked in one["qas"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path}: it is not in SQuAD's format: {error!r}") from error
