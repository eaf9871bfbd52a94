"""The file of all answers: each is a line, written as it comes. A killed run loses none, and asks none twice."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from deployments.evaluation.runner import Passage
from deployments.evaluation.task import EvaluationError

FILE = "answers.jsonl"


class Key(NamedTuple):
    """What is asked once."""

    task: str
    question: str
    row: str
    temperature: float


@dataclass(frozen=True)
class Answer:
    """One answer with its scores; ``error`` says why there is none, and then nothing was scored.

    ``run`` names all that it depends on besides the question (`Evaluation.identity`). ``first`` is the first call's
    answer where a second one was scored. ``decoded`` tokens took ``decode_s`` (`Reply`). ``reading_s`` is the time
    before the first round, retrieval included; it counts where ``has_read`` is true.
    """

    task: str
    question: str
    row: str
    temperature: float
    run: str
    seed: int
    text: str = ""
    first: str = ""
    finish: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    verdict: str = ""
    tokens: int | None = None
    decoded: int = 0
    decode_s: float = 0.0
    is_clocked_here: bool = False
    reading_s: float = 0.0
    has_read: bool | None = None
    total_s: float = 0.0
    drafted: int = 0
    accepted: int = 0
    fallback: str | None = None
    origins: dict[str, int] = field(default_factory=dict)
    pieces: list[tuple[str, str]] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)
    passages: list[Passage] = field(default_factory=list)
    error: str | None = None

    @property
    def key(self) -> Key:
        return Key(self.task, self.question, self.row, self.temperature)


class AnswersFile:
    """The answers of one run: those that were there, and those that are added."""

    def __init__(self, file: BinaryIO, known: dict[Key, Answer]) -> None:
        self._file, self.known = file, known

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[AnswersFile]:
        """Opens or makes the file in ``folder``. A last line that a kill cut off is dropped.

        Raises:
            EvaluationError: another run writes to it, or a line in its middle is damaged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        with path.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise EvaluationError(
                    f"{path}: another run writes to it; wait for it, or choose another --output"
                ) from error
            file.seek(0)
            content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            file.truncate(len(whole))
            yield cls(file, {answer.key: answer for answer in _read(whole, path)})

    def add(self, answer: Answer) -> None:
        """Writes ``answer``; it is on the disk when this returns."""
        self._file.write(json.dumps(asdict(answer)).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.known[answer.key] = answer


def read_answers(folder: Path) -> list[Answer]:
    """The answers in ``folder``, in the order in which they were written.

    Raises:
        EvaluationError: there are none, or a line is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        raise EvaluationError(f"{path}: there are no answers; `rapid eval --output {folder}` writes them")
    content = path.read_bytes()
    return _read(content[: content.rfind(b"\n") + 1], path)


def _read(content: bytes, path: Path) -> list[Answer]:
    answers = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            fields = json.loads(line)
            fields["pieces"] = [(origin, text) for origin, text in fields["pieces"]]
            fields["passages"] = [Passage(*passage) for passage in fields["passages"]]
            answers.append(Answer(**fields))
        except (ValueError, TypeError, LookupError) as error:
            raise EvaluationError(
                f"{path}, line {number}: is damaged: {error}; remove the line to ask again"
            ) from error
    return answers
