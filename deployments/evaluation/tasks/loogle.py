"""LooGLE: questions about long articles and scripts, whose evidence is in one place (short) or in several (long).

Source: Li et al., "LooGLE", 2023, and its `task2prompt.json`, `task2maxlen.json`, `automatic_metrics.py` and
`llm_score.py`. Its ROUGE-L comes from another package than ours; the F-measure is reported here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from pydantic.dataclasses import dataclass

from deployments.evaluation.metrics.answers import contains_any, f1
from deployments.evaluation.metrics.rouge import rouge_l
from deployments.evaluation.metrics.verdicts import is_true
from deployments.evaluation.reading import Source, as_texts, find, records
from deployments.evaluation.task import OPTIONS, ChatMessage, EvaluationError, Question, Task, TaskSettings, chosen
from deployments.evaluation.truncation import Document, evidence_kept, prompt

CONTEXT_TOKENS = 31_500
MAX_TOKENS = {"short": 300, "long": 500}
_BEFORE = "Please answer the question based on the long texts below. \n"
_SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z\"'(])")


class _Asked(NamedTuple):
    id: str
    question: str
    answer: str
    kind: str
    evidence: tuple[str, ...]
    document: int


@dataclass(config=OPTIONS)
class LooGLE(Task):
    """ROUGE-L and F1; with ``judged`` a judge says whether the answer means the same as the reference.

    ``keep`` is what is read of a document that is too long: "ends" as in the benchmark, or the part that has the
    "evidence".
    """

    name: str
    dependency: Literal["short", "long"]
    keep: Literal["ends", "evidence"] = "ends"
    judged: bool = False

    def __post_init__(self) -> None:
        self.metric = "correct" if self.judged else "rouge_l"
        self.judge = MeaningJudge() if self.judged else None

    def questions(self, settings: TaskSettings) -> Iterator[Question]:
        names = (f"loogle_{self.dependency}dep_qa.jsonl", f"{self.dependency}dep_qa.jsonl")
        path = find(Source(names), self.name, settings)
        rows = records(path, ("input", "title", "qa_pairs"))
        asked = [one for i, row in enumerate(rows) for one in _asked(i, row, f"{path}, record {i + 1}")]
        documents: dict[int, Document] = {}
        for one in chosen(asked, lambda one: one.id, settings):
            if one.document not in documents:
                sentences = _SENTENCE_END.split(rows[one.document]["input"])
                documents[one.document] = Document(sentences, " ", settings.tokenizer)
            yield self._question(one, documents[one.document], rows[one.document]["title"], settings)

    def score(self, question: Question, answer: str) -> dict[str, float]:
        return {
            "rouge_l": rouge_l(answer, question.references),
            "f1": f1(answer, question.references),
            "match": contains_any(answer, question.references),
        }

    def _question(self, one: _Asked, document: Document, title: str, settings: TaskSettings) -> Question:
        limit = settings.context_tokens or CONTEXT_TOKENS
        behind = f"\nQuestion: {one.question}\nAnswer: "
        evidence = [sentence for text in one.evidence for sentence in _SENTENCE_END.split(text.replace("\n", " "))]
        part = range(len(document.pieces))
        if self.keep == "evidence":
            at = [
                i for i, piece in enumerate(document.pieces) if any(sentence.strip() in piece for sentence in evidence)
            ]
            # Room for a question of 128 tokens, so that the questions of a document share its parts.
            part = document.part_with(at, limit - len(settings.tokenizer.encode(_BEFORE)) - 128)
        made = prompt(_BEFORE, document.read(part), behind, settings.tokenizer, limit)
        known = [sentence.strip() for sentence in evidence if sentence.strip() in document.text]
        kept = evidence_kept(known, made.messages[0]["content"])
        return Question(
            id=one.id,
            messages=made.messages,
            references=(one.answer,),
            max_tokens=MAX_TOKENS[self.dependency],
            query=one.question,
            whole=document.text if made.whole or len(part) < len(document.pieces) else "",
            document=f"{one.document}/{part.start}",
            group=f"evidence: {kept}",
            facts={"title": title, "kind": one.kind, "evidence": list(one.evidence)},
        )


class MeaningJudge:
    """Whether an answer and the reference mean the same: the benchmark's question to GPT-4."""

    max_tokens = 10

    def messages(self, question: Question, answer: str) -> tuple[ChatMessage, ...]:
        rules = (
            "Given one question, there is a groundtruth and a predict_answer. Please decide whether they are the same "
            "or not in semantic. Please only output 'True' or 'False' ."
        )
        (reference,) = question.references
        asked = f"Question: {question.query}\ngroudtruth = {reference}\npredict_answer = {answer}"
        return ({"role": "system", "content": rules}, {"role": "user", "content": asked})

    def scores(self, verdict: str) -> dict[str, float]:
        return {"correct": float(is_true(verdict))}


def _asked(document: int, row: dict[str, Any], where: str) -> Iterator[_Asked]:
    """The questions of a record: a list, or a Python literal of one in a string."""
    try:
        found = row["qa_pairs"] if isinstance(row["qa_pairs"], list) else ast.literal_eval(row["qa_pairs"])
        for i, one in enumerate(found):
            evidence = as_texts(one["S"])
            yield _Asked(f"{document}-{i}", one["Q"], str(one["A"]), one.get("type", ""), evidence, document)
    except (ValueError, SyntaxError, KeyError, TypeError) as error:
        raise EvaluationError(f"{where}: its qa_pairs are no list of questions with S, Q and A: {error!r}") from error
