"""LongBench v2: 503 questions with four choices about long texts, plain or with a chain of thought.

Source: Bai et al., "LongBench v2", 2024, and its `prompts/` and `pred.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from deployments.evaluation.metrics.matching import correct_letter
from deployments.evaluation.reading import Source, find, records
from deployments.evaluation.task import OPTIONS, ChatMessage, FollowUp, Question, Task, TaskSettings, chosen
from deployments.evaluation.truncation import prompt

SOURCE = Source(("longbench_v2.json", "longbench_v2.jsonl"), ("THUDM/LongBench-v2", "data.json"))
LETTERS = "ABCD"
FIELDS = ("_id", "difficulty", "length", "question", "answer", "context", *(f"choice_{letter}" for letter in LETTERS))
CONTEXT_TOKENS = 120_000
ANSWER_TOKENS = 128
THOUGHT_TOKENS = 1_024

_PLAIN = "Please read the following text and answer the question below.\n\n<text>\n"
_THOUGHT = "Please read the following text and answer the questions below.\n\n<text>\n"
_OMITTED = "Please read the following text and answer the questions below.\n\nThe text is too long and omitted here."
_STEPS = "\n\nLet’s think step by step:"
_FORMAT = 'Format your response as follows: "The correct answer is (insert answer here)".'


@dataclass(config=OPTIONS)
class LongBenchV2(Task):
    """``cot``: the model first thinks (1,024 tokens), and a second call without the text asks for the letter.

    ``length`` keeps the questions of one of the benchmark's parts. The benchmark samples with temperature 0.1.
    """

    name: str = "longbench_v2"
    cot: bool = False
    length: Literal["short", "medium", "long"] | None = None
    metric = "accuracy"

    def questions(self, settings: TaskSettings) -> Iterable[Question]:
        rows = records(find(SOURCE, self.name, settings), FIELDS)
        rows = [row for row in rows if self.length in (None, row["length"])]
        return (self._question(row, settings) for row in chosen(rows, lambda row: str(row["_id"]), settings))

    def score(self, question: Question, answer: str) -> dict[str, float]:
        letter = correct_letter(answer)
        return {"accuracy": float(letter in question.references), "answered": float(letter is not None)}

    def _question(self, row: dict[str, Any], settings: TaskSettings) -> Question:
        choices = tuple(row[f"choice_{letter}"].strip() for letter in LETTERS)
        listed = "\n".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
        # The RAPID paper's scripts retrieve with the choices too.
        query = f"{row['question'].strip()}\nChoices:\n{listed}"
        asked = f"\n\nWhat is the correct answer to this question: {query}"
        made = prompt(
            _THOUGHT if self.cot else _PLAIN,
            row["context"].strip(),
            "\n</text>" + asked + (_STEPS if self.cot else "\n\n" + _FORMAT),
            settings.tokenizer,
            settings.context_tokens or CONTEXT_TOKENS,
        )

        def second(thought: str) -> tuple[ChatMessage, ...]:
            conclusion = "Based on the above, what is the single, most likely answer choice? " + _FORMAT
            content = f"{_OMITTED}{asked}{_STEPS} {thought.strip()}\n\n{conclusion}"
            return ({"role": "user", "content": content},)

        return Question(
            id=str(row["_id"]),
            messages=made.messages,
            references=(row["answer"],),
            max_tokens=THOUGHT_TOKENS if self.cot else ANSWER_TOKENS,
            query=query,
            whole=made.whole,
            choices=choices,
            group=f"{row['difficulty']}, {row['length']}",
            facts={name: row[name] for name in ("domain", "sub_domain") if name in row},
            then=FollowUp(second, ANSWER_TOKENS) if self.cot else None,
        )
