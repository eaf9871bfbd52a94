"""The clients of `rapid chat`: one for models in this process, one for a server that speaks OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

from deployments.openai_client import OpenAIServer, text_of

if TYPE_CHECKING:
    from deployments.service import Service

Event = str | dict[str, Any]  # a piece of text; the last event is an object with `usage` and, from RAPID, `rapid`


class ChatClient(Protocol):
    """Answers chats with ``model``. The fields of ``extra`` go with every request."""

    model: str
    extra: dict[str, Any]

    def answer(self, body: dict[str, Any]) -> AsyncGenerator[Event, None]: ...


class LocalChatClient:
    """A client of models in this process."""

    # The next question is likely about the same documents, and the store ends with this process.
    extra = {"rapid": {"retrieval": {"keep": True}}}  # noqa: RUF012

    def __init__(self, model: str, service: Service) -> None:
        self.model, self._service = model, service

    async def answer(self, body: dict[str, Any]) -> AsyncGenerator[Event, None]:
        from deployments.config import PUBLIC
        from deployments.http.errors import parse
        from deployments.schemas.chat import ChatRequest
        from deployments.schemas.events import rapid_object, usage
        from rapid.events import Delta, Finish

        async with aclosing(self._service.generate(parse(ChatRequest, json.dumps(body).encode()), PUBLIC)) as events:
            async for event in events:
                yield event.text if isinstance(event, Delta | Finish) else ""
                if isinstance(event, Finish):
                    yield {"usage": usage([event.statistics]), "rapid": rapid_object(event.statistics)}


class RemoteChatClient:
    """A client of a server; its first model answers unless one is named."""

    extra: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, url: str, model: str | None) -> None:
        self._server = OpenAIServer(url)
        self.model = model or self._server.first_model()["id"]

    async def answer(self, body: dict[str, Any]) -> AsyncGenerator[Event, None]:
        last: dict[str, Any] = {}
        async with aclosing(self._server.stream(body)) as chunks:
            async for chunk in chunks:
                last |= {name: chunk[name] for name in ("usage", "rapid") if chunk.get(name)}
                yield text_of(chunk)
        yield last
