"""OpenAI's HTTP API over a `Service`: checks bodies, formats answers, and serves one model by name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from deployments.config import AppConfig
from deployments.heartbeat import beating
from deployments.http.access import guard
from deployments.http.anthropic import MessageWriter, server_sent_message
from deployments.http.errors import as_chat, handle_errors, read
from deployments.http.files import add_file_routes
from deployments.http.openapi import ERRORS, Message, TokenCount, complete, describe_body
from deployments.http.playground import page
from deployments.http.rate_limits import Charge, charge_of, client_of
from deployments.http.request_log import Middleware, Observer
from deployments.http.responses import ResponseFormatter, server_sent
from deployments.http.several import answered_together
from deployments.observability.metrics import MetricsExporter, NoExporter, RequestMetrics
from deployments.schemas.anthropic import CountTokens, MessagesRequest
from deployments.schemas.completions import ChatRequest, Completion, Health, TextRequest
from deployments.schemas.events import Events, Started, usage
from deployments.schemas.tokenize import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from rapid.errors import ModelNotFound
from rapid.events import Delta, Finish

if TYPE_CHECKING:
    from deployments.service import Service

T = TypeVar("T")

_STATUS_WITHIN_S = 0.5
_BEAT_S = 5.0  # proxies close a connection on which nothing came for 15 s and more
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second is nginx's


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

    def check_model(asked: str) -> None:
        if asked != model_name:
            raise ModelNotFound(f"the model {asked!r} is not served here; {model_name!r} is", param="model")

    def events_of(completion: Completion, charge: Charge) -> Events:
        check_model(completion.model)
        new_tokens = completion.n * (completion.tokens_to_write() or config.default_max_tokens)
        answers = [partial(service.generate, one, charge.client.tenant) for one in completion.each()]
        events = answers[0]() if len(answers) == 1 else answered_together(answers, completion.n)
        events = charge.counted(events, new_tokens * len(answers))
        return observer.generation(completion, events)

    @app.post("/v1/chat/completions", **describe_body(ChatRequest, streams=True))
    async def chat_completions(request: Request) -> Response:
        completion = await read(ChatRequest, request)
        return await _answer(completion, events_of(completion, charge_of(request)))

    @app.post("/v1/completions", **describe_body(TextRequest, streams=True))
    async def completions(request: Request) -> Response:
        completion = await read(TextRequest, request)
        return await _answer(completion, events_of(completion, charge_of(request)))

    @app.post("/v1/messages", **describe_body(MessagesRequest, streams=True, answer=Message))
    async def messages(request: Request) -> Response:
        body = await read(MessagesRequest, request)
        completion = as_chat(body)
        events = events_of(completion, charge_of(request))
        writer = MessageWriter(completion, body.ignored)
        if body.stream:
            return _streamed(server_sent_message(writer, await _begun(events)))
        async with aclosing(events):
            return JSONResponse(writer.whole([event async for event in events]))

    @app.post("/v1/messages/count_tokens", **describe_body(CountTokens, answer=TokenCount))
    async def count_tokens(request: Request) -> TokenCount:
        chat = as_chat(await read(CountTokens, request))
        check_model(chat.model)
        counted = TokenizeRequest(messages=chat.messages, tools=chat.tools)
        return TokenCount(input_tokens=(await service.tokenize(counted, client_of(request).tenant)).count)

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
        if not name:  # of a client that ends addresses with a slash
            return await models()
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


async def _answer(completion: Completion, events: Events) -> Response:
    formatter = ResponseFormatter(completion)
    if completion.stream:
        return _streamed(server_sent(formatter, await _begun(events)))
    async with aclosing(events):
        body = formatter.whole([event async for event in events])
    return JSONResponse({**body, "usage": usage(*formatter.statistics), **formatter.summary()})


def _streamed(sent: AsyncGenerator[str, None]) -> StreamingResponse:
    return StreamingResponse(sent, media_type="text/event-stream", headers=_STREAM_HEADERS)


async def _begun(events: Events) -> AsyncGenerator[Started | Delta | Finish | None, None]:
    """``events``, with None whenever there was none for a while; returned when the headers may be sent.

    An error that comes at once, as when there is no room, is raised, and gets its own status. Later errors come with
    the events.
    """
    told = beating(events, _BEAT_S)
    await anext(told)  # its first beat
    started = await anext(told)
    while started is None:
        started = await anext(told)
    second = asyncio.ensure_future(anext(told))
    await asyncio.wait([second], timeout=_STATUS_WITHIN_S)
    if second.done():
        second.result()
    return _chained(started, second, told)


async def _chained(first: T, second: asyncio.Future[T], rest: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """All items in one generator. Closing it closes ``rest``."""
    async with aclosing(rest):
        yield first
        yield await second
        async for item in rest:
            yield item
