"""The routes of OpenAI's Responses API."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from deployments.config import AppConfig
from deployments.http.errors import as_chat, read
from deployments.http.openapi import ERRORS, InputTokens, ResponseObject, describe_body
from deployments.http.rate_limits import client_of
from deployments.http.response_writer import ResponseWriter, server_sent_response
from deployments.http.streaming import begun, streamed
from deployments.schemas.chat import ChatRequest
from deployments.schemas.events import Events
from deployments.schemas.messages import ChatMessage
from deployments.schemas.responses import ResponsesRequest
from rapid.errors import InvalidRequest

if TYPE_CHECKING:
    from deployments.service import Service


def add_response_routes(
    app: FastAPI,
    config: AppConfig,
    service: Service,
    events_of: Callable[[ChatRequest, Request], Events],
    check_model: Callable[[str], None],
) -> None:
    """`/v1/responses`; ``events_of`` begins to answer a chat, ``check_model`` refuses the names of other models."""
    keeps = config.files.keep_responses_hours > 0

    async def before(body: ResponsesRequest, tenant: str) -> list[ChatMessage]:
        """The messages of the responses that ``body`` goes on from."""
        if body.previous_response_id is None:
            return []
        record = await service.responses.get(tenant, body.previous_response_id, "previous_response_id")
        return [ChatMessage.model_validate(message) for message in record["messages"]]

    @app.post("/v1/responses", **describe_body(ResponsesRequest, streams=True, answer=ResponseObject))
    async def respond(request: Request) -> Response:
        body = await read(ResponsesRequest, request)
        tenant = client_of(request).tenant
        earlier = await before(body, tenant)
        completion = as_chat(lambda: body.chat(earlier), body.chat_names)
        writer = ResponseWriter(body, completion, is_kept=keeps and body.store)

        async def store(response: dict[str, Any], said: ChatMessage) -> None:
            if response["store"]:
                messages = [message.as_json() for message in [*earlier, *body.messages(), said]]
                record = {"response": response, "input": _items(body), "messages": messages}
                await service.responses.put(tenant, writer.id, record)

        events = events_of(completion, request)
        if body.stream:
            return streamed(server_sent_response(writer, await begun(events), store))
        async with aclosing(events):
            response = writer.whole([event async for event in events])
        await store(response, writer.said())
        return JSONResponse(response)

    @app.post("/v1/responses/input_tokens", **describe_body(ResponsesRequest, answer=InputTokens))
    async def input_tokens(request: Request) -> InputTokens:
        body = await read(ResponsesRequest, request)
        tenant = client_of(request).tenant
        earlier = await before(body, tenant)
        chat = as_chat(lambda: body.chat(earlier), body.chat_names)
        check_model(chat.model)
        return InputTokens(input_tokens=(await service.tokenize(chat, tenant)).count)

    @app.get("/v1/responses/{response_id}", responses=ERRORS)
    async def retrieve(request: Request, response_id: str) -> dict[str, Any]:
        record = await service.responses.get(client_of(request).tenant, response_id)
        return dict(record["response"])

    @app.delete("/v1/responses/{response_id}", responses=ERRORS)
    async def delete(request: Request, response_id: str) -> dict[str, Any]:
        await service.responses.delete(client_of(request).tenant, response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    @app.get("/v1/responses/{response_id}/input_items", responses=ERRORS)
    async def input_items(request: Request, response_id: str) -> dict[str, Any]:
        items = (await service.responses.get(client_of(request).tenant, response_id))["input"]
        ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {}
        return {"object": "list", "data": items, **ends, "has_more": False}

    @app.post("/v1/responses/{response_id}/cancel", responses=ERRORS)
    async def cancel(request: Request, response_id: str) -> None:
        await service.responses.get(client_of(request).tenant, response_id)
        message = "background: only responses in the background are cancelled: close the connection of another instead"
        raise InvalidRequest(message, param="background")


def _items(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The items of the input, each with an id."""
    if isinstance(body.input, str):
        part = {"type": "input_text", "text": body.input}
        return [{"id": "item_0", "type": "message", "role": "user", "content": [part]}]
    shown = [item.model_dump(mode="json", exclude_none=True) for item in body.input]
    return [{"id": f"item_{i}", **item} for i, item in enumerate(shown)]
