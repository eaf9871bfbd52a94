"""OpenAI's HTTP API over a `Service`: checks bodies, formats answers, and serves one model by name."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from deployments.config import AppConfig
from deployments.http.access import guard
from deployments.http.anthropic import MessageWriter, server_sent_message
from deployments.http.batch_runner import BatchRunner
from deployments.http.batches import add_batch_routes
from deployments.http.embeddings import add_embedding_routes
from deployments.http.errors import as_chat, handle_errors, read
from deployments.http.files import add_file_routes
from deployments.http.openapi import ERRORS, Message, TokenCount, complete, describe_body
from deployments.http.playground import page
from deployments.http.rate_limits import charge_of, client_of
from deployments.http.request_log import Middleware, Observer
from deployments.http.responses import ResponseFormatter, server_sent
from deployments.http.responses_api import add_response_routes
from deployments.http.several import answered_together
from deployments.http.streaming import begun, streamed
from deployments.http.uploads import add_upload_routes
from deployments.observability.metrics import EXPOSITION, MetricsExporter, NoExporter, RequestMetrics
from deployments.schemas.anthropic import CountTokens, MessagesRequest
from deployments.schemas.chat import ChatRequest
from deployments.schemas.completions import Completion
from deployments.schemas.events import Events
from deployments.schemas.health import Health
from deployments.schemas.text import TextRequest
from deployments.schemas.tokenize import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from deployments.turns import Turns
from rapid.errors import ModelNotFound

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

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        runner.wake()  # for batches that an earlier process has left
        yield
        await runner.close()

    described = "Retrieval-augmented speculative decoding behind OpenAI's API."
    app = FastAPI(title="RAPID", description=described, lifespan=lifespan)
    runner = BatchRunner(app, service, config.access.batch_in_flight)
    handle_errors(app)
    complete(app)
    guard(app, config)
    exporter = exporter or NoExporter()
    observer = Observer(config, RequestMetrics(exporter))
    # Around the guard, so that refused requests are counted, too.
    app.add_middleware(Middleware, observer=observer, returns_id=returns_id)
    add_file_routes(app, service.files)
    add_batch_routes(app, service, runner)
    add_upload_routes(app, service)
    model_name, started = config.model_name, int(time.time())
    places = Turns(config.max_in_flight, config.target.max_queued, in_all=config.max_admitted)

    def check_model(asked: str) -> None:
        if asked != model_name:
            raise ModelNotFound(f"the model {asked!r} is not served here; {model_name!r} is", param="model")

    def events_of(completion: Completion, request: Request) -> Events:
        check_model(completion.model)
        charge = charge_of(request)
        new_tokens = completion.num_written * (completion.tokens_to_write() or config.default_max_tokens)

        def answer(one: Completion) -> Events:
            return _admitted(service.generate(one, charge.client.tenant), places, charge.client.name, one.num_written)

        answers = [partial(answer, one) for one in completion.each()]
        events = answers[0]() if len(answers) == 1 else answered_together(answers, completion.num_written)
        events = charge.counted(events, new_tokens * len(answers))
        return observer.generation(completion, events)

    @app.post("/v1/chat/completions", **describe_body(ChatRequest, streams=True))
    async def chat_completions(request: Request) -> Response:
        completion = await read(ChatRequest, request)
        return await _answer(completion, events_of(completion, request))

    @app.post("/v1/completions", **describe_body(TextRequest, streams=True))
    async def completions(request: Request) -> Response:
        completion = await read(TextRequest, request)
        return await _answer(completion, events_of(completion, request))

    @app.post("/v1/messages", **describe_body(MessagesRequest, streams=True, answer=Message))
    async def messages(request: Request) -> Response:
        body = await read(MessagesRequest, request)
        completion = as_chat(body.chat, body.chat_names)
        events = events_of(completion, request)
        writer = MessageWriter(completion, body.ignored)
        if body.stream:
            return streamed(server_sent_message(writer, await begun(events)))
        async with aclosing(events):
            return JSONResponse(writer.whole([event async for event in events]))

    @app.post("/v1/messages/count_tokens", **describe_body(CountTokens, answer=TokenCount))
    async def count_tokens(request: Request) -> TokenCount:
        body = await read(CountTokens, request)
        chat = as_chat(body.chat, body.chat_names)
        check_model(chat.model)
        return TokenCount(input_tokens=(await service.tokenize(chat, client_of(request).tenant)).count)

    add_embedding_routes(app, config, service)
    add_response_routes(app, config, service, events_of, check_model)

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

    @app.get("/metrics", response_class=PlainTextResponse, responses=ERRORS)
    async def metrics() -> Response:
        return Response(await exporter.text(), media_type=EXPOSITION)

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
    formatter = ResponseFormatter(completion)
    if completion.stream:
        return streamed(server_sent(formatter, await begun(events)))
    async with aclosing(events):
        body = formatter.whole([event async for event in events])
    return JSONResponse({**body, "usage": formatter.usage(), **formatter.summary()})
