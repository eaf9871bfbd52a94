"""OpenAI's Responses API over the same service: a request becomes a chat, and its events Responses'."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any

from deployments.http.errors import as_rapid_error, error_object
from deployments.schemas.chat import ChatRequest
from deployments.schemas.events import Started, rapid_object
from deployments.schemas.messages import ChatMessage
from deployments.schemas.responses import ResponsesRequest
from deployments.schemas.tools import CalledFunction, CallReader, ToolCall
from rapid.events import Delta, Finish, Statistics

Store = Callable[[dict[str, Any], ChatMessage], Awaitable[None]]
Event = tuple[str, dict[str, Any]]


class ResponseWriter:
    """Writes one response to ``body``, whose chat is ``completion``, whole or as events.

    ``is_kept`` is whether it is stored.

    Attributes:
        id: the response's name.
        response: the response as far as it is written.
    """

    def __init__(self, body: ResponsesRequest, completion: ChatRequest, *, is_kept: bool) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self._body, self._completion = body, completion
        self._calls: CallReader | None = None
        self._called: list[dict[str, Any]] = []
        self._text = ""
        self._message_id = ""  # of the message that is being written
        shown = body.model_dump(mode="json", by_alias=True, exclude_none=True)
        self.response: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": body.model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "store": is_kept,
            "temperature": body.temperature,
            "text": shown["text"],
            "tool_choice": shown["tool_choice"],
            "tools": shown["tools"],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            "metadata": body.metadata,
        }

    def said(self) -> ChatMessage:
        """What was written, as the message from which a later request goes on."""
        calls = [ToolCall(id=call["id"], function=CalledFunction(**call["function"])) for call in self._called]
        return ChatMessage(role="assistant", content=self._text, tool_calls=calls)

    def events(self, event: Started | Delta | Finish) -> Iterator[Event]:
        """(type, fields) of the events of a stream for ``event``."""
        if isinstance(event, Started):
            self._begin(event)
            yield "response.created", {"response": dict(self.response)}
            yield "response.in_progress", {"response": dict(self.response)}
            return
        text = self._text_of(event)
        if text:
            if not self._message_id:
                yield from self._open_message()
            yield "response.output_text.delta", {**self._where(), "delta": text, "logprobs": []}
        if isinstance(event, Finish):
            if self._message_id:
                yield from self._close_message(event)
            for item in self._call_items():
                yield from self._call_events(item)
            self._end(event)
            kind = "response.incomplete" if self.response["status"] == "incomplete" else "response.completed"
            yield kind, {"response": self.response}

    def whole(self, events: list[Started | Delta | Finish]) -> dict[str, Any]:
        """The whole response."""
        for event in events:
            if isinstance(event, Started):
                self._begin(event)
            else:
                self._text_of(event)
        finish = events[-1]
        assert isinstance(finish, Finish)
        if self._text or not self._called:
            self._message_id = _named("msg")
            self.response["output"].append(self._message_item(finish))
        self.response["output"] += self._call_items()
        self._end(finish)
        return self.response

    def failed(self, error: Exception) -> Event:
        """The last event of a stream that failed."""
        shown = error_object(as_rapid_error(error))["error"]
        self.response |= {"status": "failed", "error": {"code": shown["code"], "message": shown["message"]}}
        return "response.failed", {"response": self.response}

    def _begin(self, started: Started) -> None:
        self._calls = CallReader(self._completion.tools_in_use, started.calls) if started.calls else None

    def _text_of(self, event: Delta | Finish) -> str:
        text = self._calls.push(event.text) if self._calls else event.text
        if isinstance(event, Finish) and self._calls:
            rest, self._called = self._calls.finish()
            text += rest
        self._text += text
        return text

    def _end(self, finish: Finish) -> None:
        cut = finish.reason == "length"
        self.response |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": usage(finish.statistics),
            "rapid": rapid_object(finish.statistics) | {"ignored": self._body.ignored},
        }

    def _open_message(self) -> Iterator[Event]:
        self._message_id = _named("msg")
        item = {"id": self._message_id, "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        yield "response.output_item.added", {"output_index": 0, "item": item}
        yield "response.content_part.added", {**self._where(), "part": _part("")}

    def _close_message(self, finish: Finish) -> Iterator[Event]:
        yield "response.output_text.done", {**self._where(), "text": self._text, "logprobs": []}
        yield "response.content_part.done", {**self._where(), "part": _part(self._text)}
        item = self._message_item(finish)
        self.response["output"].append(item)
        yield "response.output_item.done", {"output_index": 0, "item": item}

    def _call_events(self, item: dict[str, Any]) -> Iterator[Event]:
        at = {"output_index": len(self.response["output"])}
        where = {"item_id": item["id"], **at}
        yield "response.output_item.added", {**at, "item": {**item, "arguments": "", "status": "in_progress"}}
        yield "response.function_call_arguments.delta", {**where, "delta": item["arguments"]}
        done = {**where, "arguments": item["arguments"], "name": item["name"]}
        yield "response.function_call_arguments.done", done
        self.response["output"].append(item)
        yield "response.output_item.done", {**at, "item": item}

    def _where(self) -> dict[str, Any]:
        return {"item_id": self._message_id, "output_index": 0, "content_index": 0}

    def _message_item(self, finish: Finish) -> dict[str, Any]:
        status = "incomplete" if finish.reason == "length" else "completed"
        item = {"id": self._message_id, "type": "message", "status": status, "role": "assistant"}
        return {**item, "content": [_part(self._text)]}

    def _call_items(self) -> list[dict[str, Any]]:
        return [
            {"id": _named("fc"), "type": "function_call", "status": "completed", "call_id": call["id"],
             **call["function"]}
            for call in self._called
        ]  # fmt: skip


def usage(statistics: Statistics) -> dict[str, Any]:
    """OpenAI's `usage` of a response."""
    read, written = statistics.prompt_tokens, statistics.emitted
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": statistics.cached_tokens},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + written,
    }


def _named(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


async def server_sent_response(
    writer: ResponseWriter, events: AsyncGenerator[Started | Delta | Finish | None, None], store: Store
) -> AsyncGenerator[str, None]:
    """The response as server-sent events, with a comment for each None; it is stored before its last event."""
    number = 0

    def sent(kind: str, fields: dict[str, Any]) -> str:
        nonlocal number
        number += 1
        data = {"type": kind, "sequence_number": number - 1, **fields}
        return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"

    try:
        async with aclosing(events):
            async for event in events:
                if event is None:
                    yield ": keep-alive\n\n"
                    continue
                for kind, fields in writer.events(event):
                    if kind in ("response.completed", "response.incomplete"):
                        await store(writer.response, writer.said())
                    yield sent(kind, fields)
    except asyncio.CancelledError:
        raise
    except Exception as error:
        yield sent(*writer.failed(error))
