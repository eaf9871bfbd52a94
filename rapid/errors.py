"""The errors that a caller can meet. Each has a machine-readable code and an HTTP status.

    RapidError                       internal_error           500
        InvalidRequest               invalid_request          400
            ContextLengthExceeded    context_length_exceeded  400
        ModelNotFound                model_not_found          404
        ModelMismatch                model_mismatch           500
        ModelFileError               model_file_error         500
        EngineLost                   engine_lost              503
            SequenceClosed           sequence_closed          503
            EngineHung               engine_hung              503
        RequestQuarantined           request_quarantined      503
        DraftLost                    drafter_lost             503
        RetrievalFailed              retrieval_failed         503
        Overloaded                   overloaded               503, or 429
    PassAbandoned                    (internal: it never leaves the engine)

The package deployments adds subclasses of RapidError:

        ConfigError                  config_error             500   deployments.config
        ManifestError                manifest_error           500   deployments.cli.manifests
        InvalidKey                   invalid_api_key          401   deployments.http.access
        OriginRefused                origin_not_allowed       403   deployments.http.access
        HostRefused                  host_not_allowed         403   deployments.http.access
        TimedOut                     request_timeout          504   deployments.http.access
        RateLimited                  rate_limit_exceeded      429   deployments.http.rate_limits
        FileNotStored                file_not_found           404   deployments.files.records
        UploadNotStored              upload_not_found         404   deployments.files.parts

Where an error is raised it may set another code or status. `retrieval.errors.RetrievalError` is no RapidError: the
package retrieval works without this one, and the backends turn its error into RetrievalFailed.

Errors cross process boundaries, so each one unpickles to an equal error. The attributes live on the instance and not on
the class: Ray hands the caller a subclass of the error's type, and this subclass looks up on the real error only the
attributes that the type lacks.
"""

from __future__ import annotations

from copyreg import __newobj__  # type: ignore[attr-defined]
from typing import Any


class RapidError(Exception):
    """An error with a `message` for people, a `code` for programs, and the request field that caused it (`param`).

    The HTTP layer answers with `status`.
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
        # Exception.__reduce__ calls the class with `args`; a subclass with other parameters would refuse them.
        return __newobj__, (type(self), *self.args), self.__dict__


class InvalidRequest(RapidError):
    """The request is malformed, or it asks for something that this service does not have."""

    _code = "invalid_request"
    _status = 400


class ContextLengthExceeded(InvalidRequest):
    """The prompt and the requested tokens do not fit the model's window. All three counts are in tokens.

    With ``is_at_least`` the prompt was not read to its end, and may have more than ``prompt_tokens``.
    """

    _code = "context_length_exceeded"

    def __init__(
        self,
        *,
        prompt_tokens: int,
        max_tokens: int,
        window: int,
        param: str | None = "messages",
        is_at_least: bool = False,
    ) -> None:
        few = "at least " if is_at_least else ""
        super().__init__(
            # Clients know this error by its beginning, which is OpenAI's.
            f"This model's maximum context length is {window} tokens, but {few}{prompt_tokens + max_tokens} were "
            f"requested: {few}{prompt_tokens} in the prompt and {max_tokens} to generate.",
            param=param,
        )
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.window = window


class ModelNotFound(RapidError):
    """The service has no model of that name, or no model of that name is embedded."""

    _code = "model_not_found"
    _status = 404


class ModelMismatch(RapidError):
    """Target and drafter have different tokenizers, so the target cannot read the drafter's token ids."""

    _code = "model_mismatch"


class ModelFileError(RapidError):
    """A model's files are missing, damaged, unreadable, or could not be downloaded."""

    _code = "model_file_error"


class EngineLost(RapidError):
    """The engine that held a sequence is gone, or no longer holds it. Another engine may continue the request."""

    _code = "engine_lost"
    _status = 503


class SequenceClosed(EngineLost):
    """The request was cancelled, or the sequence's lease expired: the engine no longer has the sequence."""

    _code = "sequence_closed"


class EngineHung(EngineLost):
    """The engine's process or its pass does not go on. It counts as lost, and another engine may continue."""

    _code = "engine_hung"


class RequestQuarantined(RapidError):
    """Engine after engine was lost while it worked on this request, so no engine gets it for some minutes."""

    _code = "request_quarantined"
    _status = 503


class DraftLost(RapidError):
    """The drafter is gone or failed, so a draft did not come. The target continues without it."""

    _code = "drafter_lost"
    _status = 503


class RetrievalFailed(RapidError):
    """The retriever or its store is gone or failed. The target then reads the whole context."""

    _code = "retrieval_failed"
    _status = 503


class Overloaded(RapidError):
    """The engines have no capacity now; the same request may succeed later.

    The status is 503, or 429 if too many requests wait already.
    """

    _code = "overloaded"
    _status = 503


class PassAbandoned(Exception):
    """A forward pass ended early, because no request waits for its result any more. It never leaves the engine."""
