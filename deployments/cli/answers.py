"""Answers questions in this process, one or the same by every strategy, with timings to compare."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from deployments.builders import local_backend
from deployments.config import AppConfig
from deployments.datastores import Datastores
from deployments.schemas.events import rapid_object, usage
from rapid.backend.local import LocalBackend, OnPrefill
from rapid.backend.protocol import Role
from rapid.datastore.search import Datastore
from rapid.events import Delta, Statistics
from rapid.generate import generate
from rapid.models.info import ModelInfo
from rapid.request import GenerationRequest
from rapid.text.tokenizer import load_tokenizer


class Answer(NamedTuple):
    """A finished completion. ``tokens_read`` is the length of the prompt that each engine read."""

    text: str
    reason: str
    statistics: Statistics
    tokens_read: dict[Role, int]

    @property
    def decode_s(self) -> float:
        """The time of all rounds, in seconds."""
        return sum(self.statistics.timings_ms[part] for part in ("drafting", "verification", "transport")) / 1e3

    @property
    def prefill_s(self) -> float:
        """The time until the first round, in seconds: retrieval, and both prompts at once."""
        return self.statistics.timings_ms["total"] / 1e3 - self.decode_s

    @property
    def tokens_per_second(self) -> float:
        """Of decoding alone."""
        return self.statistics.emitted / self.decode_s

    def as_object(self) -> dict[str, Any]:
        """What --json prints; `usage` and `rapid` are those of the HTTP answers."""
        return {
            "text": self.text,
            "finish_reason": self.reason,
            "usage": usage([self.statistics]),
            "rapid": rapid_object(self.statistics),
        }


class LocalRun:
    """Loaded models. ``on_prefill`` is `LocalBackend`'s."""

    def __init__(self, backend: LocalBackend, datastore: Datastore | None, tokens_read: dict[Role, int]) -> None:
        self._backend, self._datastore, self._tokens_read = backend, datastore, tokens_read

    @classmethod
    @contextmanager
    def open(cls, config: AppConfig, on_prefill: OnPrefill) -> "Iterator[LocalRun]":
        """Loads the models of ``config``."""
        tokens_read: dict[Role, int] = {}

        def count(role: Role, done: int, total: int) -> None:
            tokens_read[role] = total + 1  # a prompt's last token is read with the first round
            on_prefill(role, done, total)

        datastore = Datastores(config, load_tokenizer(config.target.model)).of("")
        with local_backend(config, on_prefill=count) as backend:
            yield cls(backend, datastore, tokens_read)

    def info(self, role: Role) -> ModelInfo:
        return self._backend.info(role)

    async def answer(self, request: GenerationRequest, on_text: Callable[[str, int], None]) -> Answer:
        """Writes one completion; ``on_text(piece, tokens so far)`` is called after each round."""
        self._tokens_read.clear()
        text, num_tokens = "", 0
        async for event in generate(replace(request, datastore=self._datastore), self._backend):
            text += event.text
            if isinstance(event, Delta):
                num_tokens += len(event.tokens)
            else:
                answer = Answer(text, event.reason, event.statistics, dict(self._tokens_read))
            on_text(event.text, num_tokens)
        return answer
