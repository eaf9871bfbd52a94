"""The HTTP face: OpenAI's API over the Coordinator, streamed as server-sent events or whole."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from deployments.protocol import ChatRequest, Completion, Health, TextRequest, rapid_object, usage
from rapid.errors import InvalidRequest, ModelNotFound, RapidError
from rapid.request import Delta, Finish

app = FastAPI(title="RAPID", description="Retrieval-augmented speculative decoding behind OpenAI's API.")


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


@app.exception_handler(Exception)
@app.exception_handler(RapidError)
async def _on_error(_: Request, error: Exception) -> JSONResponse:
    shown = as_rapid_error(error)
    headers = {"Retry-After": "1"} if shown.status in (429, 503) else None
    return JSONResponse(error_object(shown), status_code=shown.status, headers=headers)


@app.exception_handler(HTTPException)
async def _on_http_error(request: Request, error: HTTPException) -> JSONResponse:
    what = {404: f"there is no {request.url.path}", 405: f"{request.url.path} does not take {request.method}"}
    shown = RapidError(what.get(error.status_code, str(error.detail)), code="invalid_request", status=error.status_code)
    return JSONResponse(error_object(shown), status_code=error.status_code, headers=error.headers)


def parse(kind: type[Completion], body: bytes) -> Any:
    """The request in ``body``.

    Raises:
        InvalidRequest: it is no JSON, or a field is missing, unknown or wrong; ``param`` names the first.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or None
        words = {"extra_forbidden": "unknown field", "missing": "is required"}
        message = words.get(first["type"], first["msg"])
        if first["type"] == "json_invalid":
            raise InvalidRequest(f"the body is not valid JSON: {message}", code="invalid_json") from None
        raise InvalidRequest(f"{field}: {message}" if field else message, param=field) from None


class Shape:
    """How one endpoint's answer looks, whole and in chunks."""

    def __init__(self, completion: Completion) -> None:
        self.is_chat = isinstance(completion, ChatRequest)
        self._model = completion.model
        self._id = ("chatcmpl-" if self.is_chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())

    def chunk(self, text: str, reason: str | None = None, *, role: str | None = None) -> dict[str, Any]:
        if not self.is_chat:
            return self._body("text_completion", {"text": text, "logprobs": None}, reason)
        delta = ({"role": role} if role else {}) | ({"content": text} if text or role else {})
        return self._body("chat.completion.chunk", {"delta": delta, "logprobs": None}, reason)

    def whole(self, text: str, reason: str) -> dict[str, Any]:
        if not self.is_chat:
            return self._body("text_completion", {"text": text, "logprobs": None}, reason)
        message = {"role": "assistant", "content": text}
        return self._body("chat.completion", {"message": message, "logprobs": None}, reason)

    def _body(self, kind: str, choice: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": [{"index": 0, **choice, "finish_reason": reason}],
        }


async def _server_sent(
    completion: Completion, shape: Shape, first: Delta | Finish, events: AsyncGenerator[Delta | Finish, None]
) -> AsyncGenerator[str, None]:
    """The answer as server-sent events. The `rapid` object is on the last chunk, whichever that is."""
    include_usage = completion.stream_options.include_usage

    def sent(body: dict[str, Any]) -> str:
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    def chunk(text: str, reason: str | None = None, **more: Any) -> dict[str, Any]:
        return shape.chunk(text, reason, **more) | ({"usage": None} if include_usage else {})

    try:
        if shape.is_chat:
            yield sent(chunk("", role="assistant"))
        async with aclosing(_chained(first, events)) as all_events:
            async for event in all_events:
                if isinstance(event, Delta):
                    if event.text:
                        yield sent(chunk(event.text))
                    continue
                if event.text:
                    yield sent(chunk(event.text))
                last = chunk("", event.reason)
                if include_usage:
                    yield sent(last)
                    last = last | {"choices": [], "usage": usage(event.statistics)}
                yield sent(last | {"rapid": rapid_object(event.statistics)})
    except asyncio.CancelledError:
        raise
    except Exception as error:
        yield f"event: error\n{sent(error_object(as_rapid_error(error)))}"
    yield "data: [DONE]\n\n"


async def _chained(
    first: Delta | Finish, rest: AsyncGenerator[Delta | Finish, None]
) -> AsyncGenerator[Delta | Finish, None]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


# Last in the file: serve.ingress copies the app as it stands here, and with it what the routes can see.
@serve.deployment
@serve.ingress(app)
class Ingress:
    """Checks bodies and shapes answers; knows one model by name."""

    def __init__(self, coordinator: DeploymentHandle, model_name: str) -> None:
        self._coordinator, self._model_name, self._started = coordinator, model_name, int(time.time())

    @app.post("/v1/chat/completions")
    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(parse(ChatRequest, await request.body()))

    @app.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        return await self._answer(parse(TextRequest, await request.body()))

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        model = {"id": self._model_name, "object": "model", "created": self._started, "owned_by": "rapid"}
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def health(self) -> Health:
        health: Health = await self._coordinator.health.remote()
        return health

    async def _answer(self, completion: Completion) -> Response:
        if completion.model != self._model_name:
            raise ModelNotFound(
                f"the model {completion.model!r} is not served here; {self._model_name!r} is", param="model"
            )
        shape, events = Shape(completion), self._events(completion)
        # The first event comes before any header does, so that what is wrong with the request gets its own status.
        first = await anext(events)
        if completion.stream:
            stream = _server_sent(completion, shape, first, events)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        text, event = first.text, first
        async with aclosing(events):
            async for event in events:
                text += event.text
        assert isinstance(event, Finish)
        body = shape.whole(text, event.reason)
        return JSONResponse({**body, "usage": usage(event.statistics), "rapid": rapid_object(event.statistics)})

    async def _events(self, completion: Completion) -> AsyncGenerator[Delta | Finish, None]:
        events = self._coordinator.options(stream=True).generate.remote(completion)
        try:
            async for event in events:
                if isinstance(event, RapidError):
                    raise event
                yield event
        finally:
            events.cancel()
