"""The parts of an answer while it is written: reasoning, text, and the calls of tools, which are whole at its end."""

from __future__ import annotations

from typing import Any, NamedTuple

from deployments.schemas.completions import Completion
from deployments.schemas.events import Started
from deployments.schemas.reasoning import ReasoningReader
from deployments.schemas.tools import CallReader
from rapid.events import Delta, Finish


class Said(NamedTuple):
    """What an event adds to an answer."""

    reasoning: str
    text: str


class AnswerReader:
    """Reads the events of one choice of ``completion``.

    Attributes:
        calls: the calls in OpenAI's form; empty before the end.
        reasoning_tokens: how many tokens of the answer are reasoning so far.
    """

    def __init__(self, completion: Completion, started: Started) -> None:
        self.calls: list[dict[str, Any]] = []
        self.reasoning_tokens = 0
        self._reasoning = ReasoningReader(started.reasoning) if started.reasoning else None
        self._calls = CallReader(completion.tools_in_use, started.calls) if started.calls else None

    def read(self, event: Delta | Finish) -> Said:
        """What ``event`` adds."""
        reasoning, text = self._divided(event)
        if isinstance(event, Finish) and self._reasoning:
            last, rest = self._reasoning.finish()
            reasoning, text = reasoning + last, text + rest
        if self._calls:
            text = self._calls.push(text)
            if isinstance(event, Finish):
                rest, self.calls = self._calls.finish()
                text += rest
        return Said(reasoning, text)

    def _divided(self, event: Delta | Finish) -> tuple[str, str]:
        if self._reasoning is None:
            return "", event.text
        if isinstance(event, Finish):  # the rest of a token's text
            return self._reasoning.push(event.text)
        reasoning, text = "", ""
        for piece in event.pieces:  # a token each
            was_reasoning = self._reasoning.is_reasoning
            more, answer = self._reasoning.push(piece)
            self.reasoning_tokens += was_reasoning or self._reasoning.is_reasoning or bool(more)
            reasoning, text = reasoning + more, text + answer
        return reasoning, text
