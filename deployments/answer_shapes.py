"""How answers look over HTTP: whole, and as server-sent events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from deployments.http_errors import server_sent_error
from deployments.protocol import ChatRequest, Completion, rapid_object, usage
from rapid.request import Delta, Finish


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


async def server_sent(
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
        yield server_sent_error(error)
    yield "data: [DONE]\n\n"


async def _chained(
    first: Delta | Finish, rest: AsyncGenerator[Delta | Finish, None]
) -> AsyncGenerator[Delta | Finish, None]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event
