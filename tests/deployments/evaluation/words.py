"""A tokenizer whose tokens are words, so that lengths and cuts can be counted by hand."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deployments.evaluation.task import Question, TaskSettings
from deployments.evaluation.tasks import make_task


class Words:
    """Each run of letters with the white space before it is a token."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._texts: list[str] = []

    def encode(self, text: str) -> list[int]:
        found = []
        for piece in re.findall(r"\s*\S+|\s+$", text):
            if piece not in self._ids:
                self._ids[piece] = len(self._texts)
                self._texts.append(piece)
            found.append(self._ids[piece])
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self._texts[token] for token in tokens)


def asked(spec: str, data: Path | None = None, **settings: Any) -> list[Question]:
    """The questions of the task ``spec``."""
    return list(make_task(spec).questions(TaskSettings(Words(), data, **settings)))


def text(question: Question) -> str:
    """The last message."""
    return question.messages[-1]["content"]


def num_tokens(question: Question) -> int:
    """The words of all messages."""
    return sum(len(message["content"].split()) for message in question.messages)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file with one of ``rows`` on each line."""
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path
