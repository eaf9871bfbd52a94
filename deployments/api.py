"""OpenAI's HTTP API over a `Service`: checks bodies and shapes answers; knows one model by name."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from deployments.answer_shapes import Shape, server_sent
from deployments.config import AppConfig
from deployments.http_errors import handle_errors, parse
from deployments.openapi import ERRORS, complete, takes
from deployments.playground import page
from deployments.protocol import ChatRequest, Completion, Health, TextRequest, rapid_object, usage
from deployments.service import Service
from rapid.errors import ModelNotFound
from rapid.request import Delta, Finish


def make_api(config: AppConfig, service: Service) -> FastAPI:
    """The application that answers over HTTP."""
    app = FastAPI(title="RAPID", description="Retrieval-augmented speculative decoding behind OpenAI's API.")
    handle_errors(app)
    complete(app)
    model_name, started = config.model_name, int(time.time())

    @app.post("/v1/chat/completions", **takes(ChatRequest, streams=True))
    async def chat_completions(request: Request) -> Response:
        return await _answer(service, model_name, parse(ChatRequest, await request.body()))

    @app.post("/v1/completions", **takes(TextRequest, streams=True))
    async def completions(request: Request) -> Response:
        return await _answer(service, model_name, parse(TextRequest, await request.body()))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": model_name, "object": "model", "created": started, "owned_by": "rapid"}
        return {"object": "list", "data": [model]}

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return page()

    @app.get("/health", responses=ERRORS)
    async def health() -> Health:
        return await service.health()

    return app


async def _answer(service: Service, model_name: str, completion: Completion) -> Response:
    if completion.model != model_name:
        raise ModelNotFound(f"the model {completion.model!r} is not served here; {model_name!r} is", param="model")
    shape, events = Shape(completion), service.generate(completion)
    # The first event comes before any header does, so that what is wrong with the request gets its own status.
    first = await anext(events)
    if completion.stream:
        stream = server_sent(completion, shape, first, events)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    return await _whole(shape, first, events)


async def _whole(shape: Shape, first: Delta | Finish, events: AsyncGenerator[Delta | Finish, None]) -> Response:
    text, event = first.text, first
    async with aclosing(events):
        async for event in events:
            text += event.text
    assert isinstance(event, Finish)
    body = shape.whole(text, event.reason)
    return JSONResponse({**body, "usage": usage(event.statistics), "rapid": rapid_object(event.statistics)})
