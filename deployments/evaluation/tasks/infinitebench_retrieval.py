"""∞Bench's synthetic tasks: a pass key, a string of digits, and a value among many; from its files or made here.

What is made here is as long as ``context_tokens`` allows, with the needle at depths that go round by tenths. Source:
Zhang et al., "∞Bench", 2024, and its `construct_synthetic_dataset.py`, `prompt.py` and `compute_scores.py`.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from pydantic.dataclasses import dataclass

from deployments.evaluation.metrics.matching import first_number, names_word
from deployments.evaluation.reading import Source, as_texts, find, records
from deployments.evaluation.task import OPTIONS, Question, Task, TaskSettings, chosen
from deployments.evaluation.tasks.infinitebench import CONTEXT_TOKENS, FIELDS, HUB
from deployments.evaluation.truncation import most, prompt

QUESTIONS = 100  # that are made where no limit is given
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_HIDDEN = "There is an important info hidden inside a lot of irrelevant text. "
_QUIZ = "I will quiz you about the important information there.\n\n"


class _Kind(NamedTuple):
    before: str
    ask: str  # of what is made here; a file has its own
    behind: str
    needle: str
    max_tokens: int


_KINDS = {
    "passkey": _Kind(
        f"{_HIDDEN}Find it and memorize them. {_QUIZ}",
        "What is the pass key?",
        "\n\nThe pass key is",
        "The pass key is {key}. Remember it. {key} is the pass key.",
        6,
    ),
    "number_string": _Kind(
        f"{_HIDDEN}Find it. {_QUIZ}",
        "What is the sequence of digits?",
        "\n\nThe sequence of digits is",
        "The sequence of digits is {key}. Remember it. {key} is the sequence of digits.",
        12,
    ),
    "kv_retrieval": _Kind(
        "Extract the value corresponding to the specified key in the JSON object below.\n\n",
        'Key: "{key}"\nThe value associated with the specified key is: ',
        "",
        "",
        50,
    ),
}


class _Made(NamedTuple):
    context: str
    ask: str
    answer: str
    depth: float | None = None  # where it is made here


@dataclass(config=OPTIONS)
class Retrieval(Task):
    """Accuracy: the answer's first number is the key, or the value is one of its words.

    ``made``: the questions are made here, although a file is given.
    """

    name: str
    kind: Literal["passkey", "number_string", "kv_retrieval"]
    made: bool = False
    metric = "accuracy"

    def questions(self, settings: TaskSettings) -> Iterable[Question]:
        if self.made or (settings.data is None and not settings.from_hub):
            return self._made(settings)
        file = f"{self.kind}.jsonl"
        rows = records(find(Source((file,), (HUB, file)), self.name, settings), (*FIELDS, "input"))
        rows = chosen(rows, lambda row: str(row["id"]), settings)
        return (self._question(str(row["id"]), self._of_file(row), settings) for row in rows)

    def score(self, question: Question, answer: str) -> dict[str, float]:
        (reference,) = question.references
        right = names_word(answer, reference) if self.kind == "kv_retrieval" else first_number(answer) == reference
        return {"accuracy": float(right)}

    def _of_file(self, row: dict[str, Any]) -> _Made:
        return _Made(row["context"], row["input"], as_texts(row["answer"])[0])

    def _made(self, settings: TaskSettings) -> Iterator[Question]:
        limit = settings.context_tokens or CONTEXT_TOKENS

        def fits(i: int, number: int) -> bool:
            before, document, behind = self._pieces(self._make(i, number, settings.seed))
            return len(settings.tokenizer.encode(before + document + behind)) <= limit

        number = most(lambda number: fits(0, number), 1, limit)
        for i in range(QUESTIONS if settings.limit is None else settings.limit):
            own = number  # keys of other questions may have more tokens
            while own > 1 and not fits(i, own):
                own = min(own - 1, own * 99 // 100)
            yield self._question(f"made-{i}", self._make(i, own, settings.seed), settings)

    def _make(self, i: int, number: int, seed: int) -> _Made:
        """The ``i``-th question, with ``number`` sentences of noise, or keys."""
        generator = random.Random(f"{seed}/{self.kind}/{i}")
        depth = i % 11 / 10
        at = round(depth * number)
        kind = _KINDS[self.kind]
        if self.kind == "kv_retrieval":
            pairs = [(_uuid(generator), _uuid(generator)) for _ in range(number)]
            key, value = pairs[min(at, number - 1)]
            return _Made("JSON data:\n" + json.dumps(dict(pairs)), kind.ask.format(key=key), value, depth)
        key = _digits(generator, repeated=self.kind == "number_string")
        lines = [_NOISE] * number
        lines.insert(at, kind.needle.format(key=key))
        return _Made("\n".join(lines), kind.ask, key, depth)

    def _pieces(self, made: _Made) -> tuple[str, str, str]:
        kind = _KINDS[self.kind]
        return kind.before, made.context, f"\n\n{made.ask}{kind.behind}"

    def _question(self, name: str, made: _Made, settings: TaskSettings) -> Question:
        cut = prompt(*self._pieces(made), settings.tokenizer, settings.context_tokens or CONTEXT_TOKENS)
        return Question(
            id=name,
            messages=cut.messages,
            references=(made.answer,),
            max_tokens=_KINDS[self.kind].max_tokens,
            query=made.ask,
            whole=cut.whole,
            group="" if made.depth is None else f"depth {made.depth:.1f}",
        )


def _uuid(generator: random.Random) -> str:
    return str(uuid.UUID(int=generator.getrandbits(128), version=4))


def _digits(generator: random.Random, *, repeated: bool) -> str:
    """Five digits; ``repeated``: ten, where five times a digit before is written once more behind itself."""
    digits = [str(generator.randrange(10)) for _ in range(5)]
    for length in range(5, 10 if repeated else 5):
        at = generator.randrange(length)
        digits.insert(at, digits[at])
    return "".join(digits)
