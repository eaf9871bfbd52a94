"""What goes wrong, as a client sees it: OpenAI's error object with the status that belongs to it."""

import json
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from ray.exceptions import RayError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from rapid.errors import InvalidRequest, RapidError

T = TypeVar("T", bound=BaseModel)


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


def as_rapid_error(error: Exception) -> RapidError:
    """What a client may see of ``error``: our own errors as they are, of all others only that it is not their fault."""
    if isinstance(error, RapidError):
        return error
    if isinstance(error, RayError):
        return RapidError("a part of the service stopped while it worked on this request; try again", status=503)
    return RapidError("internal error; the server's log has the details")


def error_response(error: Exception, headers: dict[str, str] | None = None) -> JSONResponse:
    """The whole answer to a request that failed."""
    shown = as_rapid_error(error)
    retry = {"Retry-After": "1"} if shown.status in (429, 503) else {}
    return JSONResponse(error_object(shown), status_code=shown.status, headers=retry | (headers or {}))


def server_sent_error(error: Exception) -> str:
    """The end of an event stream that failed."""
    return f"event: error\ndata: {json.dumps(error_object(as_rapid_error(error)), ensure_ascii=False)}\n\n"


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    request.state.error = error  # for the log
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    what = {404: f"there is no {request.url.path}", 405: f"{request.url.path} does not take {request.method}"}
    shown = RapidError(what.get(error.status_code, str(error.detail)), code="invalid_request", status=error.status_code)
    headers = {"Allow": _methods(request)} if error.status_code == 405 else error.headers
    return JSONResponse(error_object(shown), status_code=error.status_code, headers=headers)


def _methods(request: Request) -> str:
    """What the path of ``request`` takes: each method has a route of its own, and Starlette names the first's alone."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in routes for method in route.methods or ()}))


async def _on_half_a_body(request: Request, _: Exception) -> JSONResponse:
    # Nobody reads it; but it is no error of ours, which would be logged.
    return await _on_error(request, InvalidRequest("the connection ended before the body did"))


async def _on_wrong_parameter(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return await _on_error(request, InvalidRequest(f"{name}: {first['msg']}", param=name))


def handle_errors(app: FastAPI) -> None:
    """Makes ``app`` answer every error in OpenAI's shape."""
    app.add_exception_handler(Exception, _on_error)
    app.add_exception_handler(RapidError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_wrong_parameter)
    app.add_exception_handler(ClientDisconnect, _on_half_a_body)


def parse(kind: type[T], body: bytes) -> T:
    """The request in ``body``.

    Raises:
        InvalidRequest: it is no JSON, or a field is missing, unknown or wrong; ``param`` names the first.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        # A kind of message or part, which pydantic adds to the path, has a capital; no field of ours does.
        *path, last = [str(part) for part in first["loc"]] or [""]
        path = [part for part in path if not part[:1].isupper()]
        if first["type"] == "extra_forbidden" or not last[:1].isupper():
            path.append(last)
        field = ".".join(path) or None
        words = {"extra_forbidden": "unknown field", "missing": "is required"}
        message = words.get(first["type"], first["msg"])
        if first["type"] == "json_invalid":
            raise InvalidRequest(f"the body is not valid JSON: {message}", code="invalid_json") from None
        raise InvalidRequest(f"{field}: {message}" if field else message, param=field) from None
