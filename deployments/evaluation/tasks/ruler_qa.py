"""RULER's questions about one of many documents: "qa_1" of SQuAD, "qa_2" of HotpotQA, or of NQ's gold passages.

Source: Hsieh et al., "RULER", 2024, and its `qa.py`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic.dataclasses import dataclass

from deployments.evaluation.metrics.matching import any_contained
from deployments.evaluation.reading import Source, find, records, text
from deployments.evaluation.task import OPTIONS, EvaluationError, Question, TaskSettings
from deployments.evaluation.tasks.ruler import Ruler, Sample

SOURCES = {
    "squad": Source(("squad.json", "dev-v2.0.json", "dev-v1.1.json", "xquad.en.json")),
    "hotpotqa": Source(("hotpotqa.json", "hotpot_dev_distractor_v1.json", "nq_open_oracle.jsonl.gz")),
}
_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


class _Asked(NamedTuple):
    question: str
    answers: tuple[str, ...]
    needed: tuple[str, ...]  # documents that must be there
    near: tuple[str, ...] = ()  # documents that are taken before others


@dataclass(config=OPTIONS)
class DocumentQA(Ruler):
    """One answer of several is enough. Pieces are documents; SQuAD's are first those of the same article."""

    name: str
    dataset: Literal["squad", "hotpotqa"]
    max_tokens = 32

    def prepare(self, settings: TaskSettings) -> None:
        path = find(SOURCES[self.dataset], self.name, settings)
        self._asked = _squad(path) if self.dataset == "squad" else _hotpot(path)
        self._documents = sorted({document for one in self._asked for document in (*one.needed, *one.near)})
        random.Random(settings.seed).shuffle(self._asked)

    def sizes(self, limit: int) -> tuple[int, int]:
        return max(len(one.needed) for one in self._asked), len(self._documents)

    def make(self, i: int, generator: random.Random, size: int) -> Sample:
        asked = self._asked[i % len(self._asked)]
        near = [document for document in asked.near if document not in asked.needed]
        documents = [*asked.needed, *generator.sample(near, min(len(near), size - len(asked.needed)))]
        taken = set(documents)
        others = generator.sample(self._documents, min(len(self._documents), size + len(taken)))
        documents += [document for document in others if document not in taken][: max(0, size - len(documents))]
        generator.shuffle(documents)
        return Sample(
            f"{_INSTRUCTION}\n\nThe following are given documents.\n\n",
            "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, start=1)),
            f"\n\n{_INSTRUCTION}\n\nQuestion: {asked.question} Answer:",
            asked.question,
            list(asked.answers),
        )

    def score(self, question: Question, answer: str) -> dict[str, float]:
        return {"match": any_contained(answer, question.references)}


def _squad(path: Path) -> list[_Asked]:
    try:
        articles = json.loads(text(path))["data"]
        return [
            _Asked(
                asked["question"],
                tuple(answer["text"] for answer in asked["answers"]),
                (paragraph["context"],),
                tuple(other["context"] for other in article["paragraphs"]),
            )
            for article in articles
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
            if not asked.get("is_impossible")
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path}: it is not in SQuAD's format: {error!r}") from error


def _hotpot(path: Path) -> list[_Asked]:
    rows = records(path, ("question",))
    if "ctxs" in rows[0]:  # NQ's gold passages
        return [_Asked(row["question"], tuple(row["answers"]), _passages(row["ctxs"])) for row in rows]
    if "context" not in rows[0] or "answer" not in rows[0]:
        raise EvaluationError(f"{path}: it has HotpotQA's fields (context, answer) no more than NQ's (ctxs, answers)")
    documents = [tuple(f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]) for row in rows]
    return [_Asked(row["question"], (row["answer"],), one) for row, one in zip(rows, documents, strict=True)]


def _passages(contexts: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(f"{one['title']}\n{one['text']}" for one in contexts if one.get("isgold"))
