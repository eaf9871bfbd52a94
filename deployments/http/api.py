"""OpenAI's HTTP API over a `Service`: checks bodies, formats answers, and serves one model by name."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from importlib import metadata
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from deployments.config import AppConfig
from deployments.http.access import guard
from deployments.http.errors import handle_errors, read
from deployments.http.files import add_file_routes
from deployments.http.openapi import ERRORS, complete, describe_body
from deployments.http.playground import page
from deployments.http.rate_limits import Charge, charge_of, client_of
from deployments.http.request_log import Middleware, Observer
from deployments.http.responses import ResponseFormatter, server_sent
from deployments.observability.metrics import MetricsExporter, NoExporter, RequestMetrics
from deployments.schemas.completions import ChatRequest, Completion, Health, TextRequest
from deployments.schemas.events import Events, Started, usage
from deployments.schemas.tokenize import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from deployments.turns import Turns
from rapid.errors import ModelNotFound
from rapid.events import Delta, Finish

if TYPE_CHECKING:
    from deployments.service import Service


def make_api(
    config: AppConfig, service: Service, *, exporter: MetricsExporter | None = None, returns_id: bool = True
) -> FastAPI:
    """The application that answers over HTTP.

    Args:
        exporter: publishes the metrics of requests; without one they are not published.
        returns_id: whether answers name their request in a header (`request_log.Middleware`).
    """
    app = FastAPI(title="RAPID", description="Retrieval-augmented speculative decoding behind OpenAI's API.")
    handle_errors(app)
    complete(app)
    guard(app, config)
    observer = Observer(config, RequestMetrics(exporter or NoExporter()))
    # Around the guard, so that refused requests are counted, too.
    app.add_middleware(Middleware, observer=observer, returns_id=returns_id)
    add_file_routes(app, service.files)
    model_name, started = config.model_name, int(time.time())
    places = Turns(config.max_in_flight, config.target.max_queued, in_all=config.max_admitted)

    def check_model(asked: str) -> None:
        if asked != model_name:
            raise ModelNotFound(f"the model {asked!r} is not served here; {model_name!r} is", param="model")

    async def answer(completion: Completion, charge: Charge) -> Response:
        check_model(completion.model)
        most_new_tokens = completion.n * (completion.tokens_to_write() or config.default_max_tokens)
        admitted = _admitted(
            service.generate(completion, charge.client.tenant), places, charge.client.name, completion.n
        )
        events = charge.counted(admitted, most_new_tokens)
        return await _answer(completion, observer.generation(completion, events))

    @app.post("/v1/chat/completions", **describe_body(ChatRequest, streams=True))
    async def chat_completions(request: Request) -> Response:
        completion = await read(ChatRequest, request)
        return await answer(completion, charge_of(request))

    @app.post("/v1/completions", **describe_body(TextRequest, streams=True))
    async def completions(request: Request) -> Response:
        completion = await read(TextRequest, request)
        return await answer(completion, charge_of(request))

    async def model() -> dict[str, Any]:
        return {
            "id": model_name,
            "object": "model",
            "created": started,
            "owned_by": "rapid",
            "max_model_len": await service.window(),
        }

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [await model()]}

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def one_model(name: str) -> dict[str, Any]:
        check_model(name)
        return await model()

    @app.post("/tokenize", **describe_body(TokenizeRequest, answer=Tokenized))
    async def tokenize(request: Request) -> Tokenized:
        body = await read(TokenizeRequest, request)
        check_model(body.model or model_name)
        return await service.tokenize(body, client_of(request).tenant)

    @app.post("/detokenize", **describe_body(DetokenizeRequest, answer=Detokenized))
    async def detokenize(request: Request) -> Detokenized:
        body = await read(DetokenizeRequest, request)
        check_model(body.model or model_name)
        return await service.detokenize(body, client_of(request).tenant)

    @app.get("/version", responses=ERRORS)
    async def version() -> dict[str, str]:
        return {"version": metadata.version("rapid-serve")}

    shown = page()

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return shown

    @app.get("/health", responses=ERRORS)
    async def health() -> Health:
        return await service.health()

    return app


async def _admitted(events: Events, places: Turns, client: str, num_choices: int) -> Events:
    """``events``, which begin when ``client`` has a place for each choice."""
    async with places.turn(client, num_choices), aclosing(events):
        async for event in events:
            yield event


async def _answer(completion: Completion, events: Events) -> Response:
    # The first tokens come before the headers, so that an error in the request gets its own status.
    started, first = await anext(events), await anext(events)
    assert isinstance(started, Started) and not isinstance(first, Started)
    formatter = ResponseFormatter(completion, started)
    written = _written(first, events)
    if completion.stream:
        stream = server_sent(formatter, written)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    async with aclosing(written):
        body = formatter.whole([event async for event in written])
    return JSONResponse({**body, "usage": usage(*formatter.statistics), **formatter.summary()})


async def _written(first: Delta | Finish, rest: Events) -> AsyncGenerator[Delta | Finish, None]:
    """``first`` and the ``rest`` of the events after `Started`. Closing the generator closes ``rest``."""
    async with aclosing(rest):
        yield first
        async for event in rest:
            assert not isinstance(event, Started)
            yield event
