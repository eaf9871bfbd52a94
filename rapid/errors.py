"""Every error a caller can meet, each with a machine-readable code and an HTTP-style status.

They cross process boundaries, so each one unpickles to an equal error. The attributes live on the instance, never on
the class: Ray hands a caller a subclass of the error's type that looks up on the real error only what the type lacks.
"""

from __future__ import annotations

from copyreg import __newobj__  # type: ignore[attr-defined]
from typing import Any


class RapidError(Exception):
    """An error with a `message` for people, a `code` for programs, and the request field (`param`) that caused it.

    `status` is the HTTP status the error becomes when it reaches the HTTP layer.
    """

    _code = "internal_error"
    _status = 500

    def __init__(
        self, message: str, *, code: str | None = None, status: int | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self._code
        self.status = status or self._status
        self.param = param

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own calls the class with `args`, which a subclass with other parameters would refuse.
        return __newobj__, (type(self), *self.args), self.__dict__


class InvalidRequest(RapidError):
    """The request is malformed or asks for something that cannot be had."""

    _code = "invalid_request"
    _status = 400


class ContextLengthExceeded(InvalidRequest):
    """The prompt and the tokens asked for do not fit the model's window. All three counts are in tokens."""

    _code = "context_length_exceeded"

    def __init__(self, *, prompt_tokens: int, max_tokens: int, window: int, param: str | None = "messages") -> None:
        super().__init__(
            f"This model's context is {window} tokens, but {prompt_tokens + max_tokens} were requested: "
            f"{prompt_tokens} in the prompt and {max_tokens} to generate.",
            param=param,
        )
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.window = window


class ModelNotFound(RapidError):
    """No model of that name is served, or none is embedded."""

    _code = "model_not_found"
    _status = 404


class ModelMismatch(RapidError):
    """Target and drafter do not share a tokenizer, so one's draft means nothing to the other."""

    _code = "model_mismatch"


class ModelFileError(RapidError):
    """A model's files are missing, damaged, unreadable, or could not be downloaded."""

    _code = "model_file_error"


class EngineLost(RapidError):
    """The engine that held a sequence is gone, or no longer holds it; another one may go on."""

    _code = "engine_lost"
    _status = 503


class SequenceClosed(EngineLost):
    """The sequence was cancelled, or its lease expired: there is nothing left to extend."""

    _code = "sequence_closed"


class DraftLost(RapidError):
    """A draft that was asked for did not come: its drafter is gone, or failed. The target can do without."""

    _code = "drafter_lost"
    _status = 503


class RetrievalFailed(RapidError):
    """The retriever, or its store, is gone or failed. An answer can do without: the target reads the whole context."""

    _code = "retrieval_failed"
    _status = 503


class Overloaded(RapidError):
    """No capacity now; the same request may succeed later. Status 503, or 429 where this caller's own queue is full."""

    _code = "overloaded"
    _status = 503


class PassAbandoned(Exception):
    """A forward pass ended early: nobody wants its result any more. Never leaves the engine."""
