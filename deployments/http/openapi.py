"""The API's description in /openapi.json: bodies, answers and errors.

The routes read their bodies themselves, so that every error has OpenAI's shape. FastAPI sees neither bodies nor errors,
so they are described here; the form of an upload is described in `deployments.http.files`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from rapid.events import Statistics, Transfer

REF = "#/components/schemas/{model}"


class Error(BaseModel):
    """An error in words, and as a ``code`` for programs; ``param`` names the wrong field of the request."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Every answer with a status of 400 or more, and the `error` event of a stream."""

    error: Error


class MessageError(BaseModel):
    """An error in words; ``type`` is Anthropic's."""

    type: str
    message: str


class MessageErrorBody(BaseModel):
    """The same of `/v1/messages`, in Anthropic's form."""

    type: str
    error: MessageError


@dataclass
class RapidObject(Statistics):
    """The `rapid` object of an answer; `transfer` where η was chosen."""

    transfer: Transfer | None = None  # type: ignore[assignment]


class Usage(BaseModel):
    model_config = ConfigDict(extra="allow")
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(BaseModel):
    """With `message` from chats, `text` from completions."""

    model_config = ConfigDict(extra="allow")
    index: int
    finish_reason: str | None


class Answer(BaseModel):
    """An answer in one piece, OpenAI's with a `rapid` object more."""

    model_config = ConfigDict(extra="allow")
    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    rapid: RapidObject


class Message(BaseModel):
    """An answer of `/v1/messages`, Anthropic's with a `rapid` object more."""

    model_config = ConfigDict(extra="allow")
    id: str
    type: str
    role: str
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: dict[str, int]
    rapid: RapidObject


class ResponseObject(BaseModel):
    """An answer of `/v1/responses`, OpenAI's with a `rapid` object more."""

    model_config = ConfigDict(extra="allow")
    id: str
    object: str
    status: str
    model: str
    output: list[dict[str, Any]]
    rapid: RapidObject


class BatchObject(BaseModel):
    """A batch, OpenAI's."""

    model_config = ConfigDict(extra="allow")
    id: str
    object: str
    endpoint: str
    status: str
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    request_counts: dict[str, int]


class TokenCount(BaseModel):
    """What a message would have as its prompt."""

    input_tokens: int


class InputTokens(TokenCount):
    """What a response would have as its prompt."""

    object: Literal["response.input_tokens"] = "response.input_tokens"


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is wrong"},
    413: {"model": ErrorBody, "description": "The body, or what it unpacks to, is too large"},
    415: {"model": ErrorBody, "description": "The body's media type or encoding, or the file's, is not read here"},
    429: {"model": ErrorBody, "description": "There are too many requests or tokens: try again"},
    503: {"model": ErrorBody, "description": "A part of the service is gone or full: try again"},
}

MESSAGE_ERRORS = {status: told | {"model": MessageErrorBody} for status, told in ERRORS.items()}

# One server-sent event. Its data is a chunk of the answer, [DONE], or an `ErrorBody` where the event is `error`.
EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}


def describe_body(body: type[BaseModel], *, streams: bool = False, answer: type[BaseModel] = Answer) -> dict[str, Any]:
    """The keyword arguments of a route that reads ``body`` from JSON."""
    schema = body.model_json_schema(ref_template=REF)
    _allow_null(schema)
    described = {"required": True, "content": {"application/json": {"schema": schema}}}
    responses: dict[int | str, dict[str, Any]] = {200: {"model": answer, "description": "The answer"}}
    if streams:
        responses[200] |= {
            "description": "The answer; with `stream`, chunks of it as server-sent events, `data: [DONE]` at the end",
            "content": {"text/event-stream": {"schema": EVENT}},
        }
    errors = MESSAGE_ERRORS if answer in (Message, TokenCount) else ERRORS
    return {"openapi_extra": {"requestBody": described}, "responses": errors | responses}


def _allow_null(schema: dict[str, Any]) -> None:
    """Allows null for every optional field: `Body` takes it as absent, and its schema does not say so."""
    for model in (schema, *schema.get("$defs", {}).values()):
        for name in set(model.get("properties", {})) - set(model.get("required", ())):
            allowed = model["properties"][name]
            if {"type": "null"} not in allowed.get("anyOf", []):
                model["properties"][name] = {"anyOf": [allowed, {"type": "null"}]}


def complete(app: FastAPI) -> None:
    """Has ``app`` put the models of bodies where the references in its description point."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        made = described()
        for operation in (it for path in made["paths"].values() for it in path.values()):
            for content in operation.get("requestBody", {}).get("content", {}).values():
                made.setdefault("components", {}).setdefault("schemas", {}).update(content["schema"].pop("$defs", {}))
        return made

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's manual has it
