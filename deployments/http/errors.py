"""Errors as a client sees them: OpenAI's error object, with the status that belongs to it."""

from __future__ import annotations

import asyncio
import json
import random
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from deployments.http.not_served import absent
from deployments.schemas.body import BELONGS
from deployments.schemas.chat import ChatRequest
from rapid.errors import InvalidRequest, RapidError

T = TypeVar("T", bound=BaseModel)

LONGEST_RETRY_S = 5
_MOST_UNPACKED = 10  # times as large as it was packed, which text hardly is
_SMALL_BODY = 2**16  # bytes that are parsed sooner than a thread has begun
_parsers = ThreadPoolExecutor(2, thread_name_prefix="parse")


def error_object(error: RapidError) -> dict[str, Any]:
    """OpenAI's error body."""
    kind = (
        "rate_limit_error" if error.status == 429 else "invalid_request_error" if error.status < 500 else "server_error"
    )
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.code,
        }
    }


def anthropic_error(error: RapidError) -> dict[str, Any]:
    """The same in Anthropic's form."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
             429: "rate_limit_error", 503: "overloaded_error"}  # fmt: skip
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def as_rapid_error(error: Exception) -> RapidError:
    """``error`` where it is a RapidError; else an internal error, which tells a client no details."""
    if isinstance(error, RapidError):
        return error
    return RapidError("internal error; the server's log has the details")


def error_response(error: Exception, path: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The whole answer to a request of ``path`` that failed."""
    shown = as_rapid_error(error)
    # Clients that were refused together must not come back together.
    after_s = getattr(shown, "retry_after", None) or random.randint(1, LONGEST_RETRY_S)
    retry = {"Retry-After": str(after_s)} if shown.status in (429, 503) else {}
    return JSONResponse(_object_of(path, shown), status_code=shown.status, headers=retry | (headers or {}))


def _object_of(path: str, error: RapidError) -> dict[str, Any]:
    return anthropic_error(error) if path.startswith("/v1/messages") else error_object(error)


def server_sent_error(error: Exception) -> str:
    """The last event of a stream that failed, before its [DONE]."""
    return f"event: error\ndata: {json.dumps(error_object(as_rapid_error(error)), ensure_ascii=False)}\n\n"


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    request.state.error = error  # for the log
    return error_response(error, request.scope["path"])


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    what = {404: absent(request.scope["path"]), 405: f"{request.scope['path']} does not take {request.method}"}
    shown = RapidError(what.get(error.status_code, str(error.detail)), code="invalid_request", status=error.status_code)
    headers = {"Allow": _methods(request)} if error.status_code == 405 else error.headers
    return JSONResponse(_object_of(request.scope["path"], shown), status_code=error.status_code, headers=headers)


def _methods(request: Request) -> str:
    """The methods that the path of ``request`` takes: each has its own route, and Starlette names only one route's.

    A path that is named stands before one that ends with an id.
    """
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    routes = [route for route in routes if route.path == request.scope["path"]] or routes
    return ", ".join(sorted({method for route in routes for method in route.methods or ()}))


async def _on_half_a_body(request: Request, _: Exception) -> JSONResponse:
    # No client reads this answer, but as an error of the server the request would be logged with a traceback.
    return await _on_error(request, InvalidRequest("the connection ended before the body did"))


async def _on_wrong_parameter(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return await _on_error(request, InvalidRequest(f"{name}: {first['msg']}", param=name))


def handle_errors(app: FastAPI) -> None:
    """Has ``app`` answer wrong requests with OpenAI's error object; `Middleware` answers unexpected errors."""
    app.add_exception_handler(RapidError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_wrong_parameter)
    app.add_exception_handler(ClientDisconnect, _on_half_a_body)


async def read(kind: type[T], request: Request) -> T:
    """The body of ``request``.

    Raises:
        InvalidRequest: its media type is not JSON (415), or as `parse`.
    """
    if not is_json(request.headers):
        message = "the body must be JSON: send the header `Content-Type: application/json`"
        raise InvalidRequest(message, code="unsupported_media_type", status=415)
    body = _unpacked(await request.body(), request.headers.get("content-encoding", "identity").strip().lower())
    if len(body) <= _SMALL_BODY:
        return parse(kind, body)
    return await asyncio.get_running_loop().run_in_executor(_parsers, parse, kind, body)


def _unpacked(body: bytes, encoding: str) -> bytes:
    """``body`` as it was before the client compressed it.

    Raises:
        InvalidRequest: the encoding is neither gzip nor none (415), the body is not what it says, or it grows beyond
            `_MOST_UNPACKED` times its size and a small body (413).
    """
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip"):
        message = f"Content-Encoding {encoding[:64]} is not read here; gzip is"
        raise InvalidRequest(message, code="unsupported_media_type", status=415)
    unpacker, most = zlib.decompressobj(wbits=31), max(_SMALL_BODY, _MOST_UNPACKED * len(body))
    try:
        unpacked = unpacker.decompress(body, most)
    except zlib.error as error:
        raise InvalidRequest(f"the body is not gzip: {error}", code="invalid_json") from error
    if unpacker.unconsumed_tail:
        raise InvalidRequest(f"the body unpacks to more than {most} bytes", code="request_too_large", status=413)
    if not unpacker.eof:
        raise InvalidRequest("the gzip body ends before its end", code="invalid_json")
    return unpacked


def is_json(headers: Headers) -> bool:
    """Whether the media type is JSON. For a page of another origin a browser sends such a body only with permission."""
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))


def parse(kind: type[T], body: bytes) -> T:
    """The request in ``body``.

    Raises:
        InvalidRequest: the body is no JSON, or a field is missing, unknown or wrong; ``param`` names the first.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
    if errors[0]["type"] == "json_invalid":
        raise InvalidRequest(f"the body is not valid JSON: {errors[0]['msg']}", code="invalid_json")
    sent = from_json(body)
    first = _field(errors[0], sent)
    # A field of several kinds has an error from each kind. The deepest one is of the kind that the client meant.
    of_it = [(field, wrong) for wrong in errors if (field := _field(wrong, sent))[: len(first)] == first]
    path = max((field for field, _ in of_it), key=len)
    said = " or ".join(dict.fromkeys(_in_words(wrong) for field, wrong in of_it if field == path))
    name = ".".join(path) or None
    raise InvalidRequest(f"{name}: {said}" if name else said, param=name)


def as_chat(make: Callable[[], ChatRequest], names: Mapping[str, str]) -> ChatRequest:
    """The chat that ``make`` makes of another body; ``names`` says what that calls a chat's fields.

    Raises:
        InvalidRequest: its fields do not go together.
    """
    try:
        return make()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or first.get("ctx", {}).get("field", "")
        name = names.get(field, field)
        raise InvalidRequest(f"{name}: {first['msg']}", param=name) from error


def _field(wrong: Any, sent: Any) -> list[str]:
    """The path of a wrong field as the client wrote it: pydantic puts names of kinds between the fields."""
    path = []
    *outer, last = wrong["loc"] or ("",)
    for part in outer:
        if (isinstance(sent, dict) and part in sent) or (isinstance(sent, list) and isinstance(part, int)):
            sent = sent[part]
            path.append(str(part))
    is_named = wrong["type"] in ("missing", "extra_forbidden") or isinstance(last, int)
    if is_named or (isinstance(sent, dict) and last in sent):
        path.append(str(last))
    more = wrong.get("ctx", {})
    if wrong["type"].startswith("union_tag"):
        path.append(more["discriminator"].strip("'"))
    return path + ([more["field"]] if wrong["type"] == BELONGS and more["field"] else [])


def _in_words(wrong: Any) -> str:
    kind, more = wrong["type"], wrong.get("ctx", {})
    words = {
        "extra_forbidden": "unknown field",
        "missing": "is required",
        "union_tag_not_found": "is required",
        "model_type": "must be an object",
        "dict_type": "must be an object",
        "list_type": "must be a list",
    }
    if kind == "union_tag_invalid":
        return f"must be one of {more['expected_tags']}"
    said: str = words.get(kind) or wrong["msg"].replace("Input should be", "must be")
    return f"its name {said}" if wrong["loc"][-1:] == ("[key]",) else said
