"""The clients of `rapid chat`: one for models in this process, one for a server that speaks OpenAI's API."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import httpx

from rapid.errors import RapidError

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
    """A client of a server. The key is $RAPID_API_KEY, or $OPENAI_API_KEY."""

    extra: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, url: str, model: str | None) -> None:
        key = os.environ.get("RAPID_API_KEY") or os.environ.get("OPENAI_API_KEY")
        self._options: dict[str, Any] = {
            "base_url": url.rstrip("/"),
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "timeout": httpx.Timeout(10, read=None),  # a long document is read for minutes
            # A proxy that the environment names does not lead to this machine.
            "trust_env": urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1"),
        }
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        with _in_words(self._options["base_url"]), httpx.Client(**self._options) as client:
            response = client.get("/models")
            _check(response, response.content)
            name: str = response.json()["data"][0]["id"]
            return name

    async def answer(self, body: dict[str, Any]) -> AsyncGenerator[Event, None]:
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        last: dict[str, Any] = {}
        with _in_words(self._options["base_url"]):
            async with (
                httpx.AsyncClient(**self._options) as client,
                client.stream("POST", "/chat/completions", json=body) as response,
            ):
                _check(response, await response.aread() if response.is_error else b"")
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    data = json.loads(line.removeprefix("data: "))
                    if "error" in data:
                        raise RapidError(data["error"]["message"])
                    last |= {name: data[name] for name in ("usage", "rapid") if data.get(name)}
                    for choice in data["choices"]:
                        yield choice["delta"].get("content") or ""
        yield last


@contextmanager
def _in_words(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise RapidError(f"{url} cannot be asked: {error or type(error).__name__}", status=503) from error
    except (ValueError, LookupError) as error:
        raise RapidError(f"what answers at {url} does not speak OpenAI's API: {error!r}") from error


def _check(response: httpx.Response, body: bytes) -> None:
    if not response.is_error:
        return
    error: dict[str, Any] = {}
    with suppress(ValueError, LookupError):
        found = json.loads(body)["error"]
        error = found if isinstance(found, dict) else {"message": found}
    message = error.get("message") or body.decode(errors="replace")[:300]
    raise RapidError(f"{response.status_code} from {response.url}: {message}", code=error.get("code"))
