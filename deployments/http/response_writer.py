"""OpenAI's Responses API over the same service: a request becomes a chat, and its events Responses'."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

from deployments.http.answers import AnswerReader
from deployments.http.errors import as_rapid_error, error_object
from deployments.http.streaming import told
from deployments.schemas.chat import ChatRequest
from deployments.schemas.events import Event, Started, rapid_object
from deployments.schemas.messages import ChatMessage
from deployments.schemas.responses import ResponsesRequest
from deployments.schemas.tools import CalledFunction, ToolCall
from rapid.events import Delta, Finish, Statistics

Store = Callable[[dict[str, Any], ChatMessage], Awaitable[None]]
WrittenEvent = tuple[str, dict[str, Any]]
_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}
_IDS = {"message": "msg", "reasoning": "rs"}


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
        self._answer: AnswerReader | None = None
        self._text = ""
        self._item: dict[str, Any] | None = None  # a message or reasoning that is being written
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
        written = self._answer.calls if self._answer else []
        calls = [ToolCall(id=call["id"], function=CalledFunction(**call["function"])) for call in written]
        return ChatMessage(role="assistant", content=self._text, tool_calls=calls)

    def events(self, event: Event) -> Iterator[WrittenEvent]:
        """(type, fields) of the events of a stream for ``event``."""
        if isinstance(event, Started):
            self._answer = AnswerReader(self._completion, event)
            yield "response.created", {"response": dict(self.response)}
            yield "response.in_progress", {"response": dict(self.response)}
        elif isinstance(event, Delta | Finish) and self._answer is not None:
            said = self._answer.read(event)
            self._text += said.text
            yield from self._say("reasoning", said.reasoning)
            yield from self._say("message", said.text)
            if isinstance(event, Finish):
                yield from self._finish(event, self._answer)

    def whole(self, events: list[Event]) -> dict[str, Any]:
        """The whole response."""
        for event in events:
            for _ in self.events(event):  # which fill it
                pass
        return self.response

    def failed(self, error: Exception) -> WrittenEvent:
        """The last event of a stream that failed."""
        shown = error_object(as_rapid_error(error))["error"]
        self.response |= {"status": "failed", "error": {"code": shown["code"], "message": shown["message"]}}
        return "response.failed", {"response": self.response}

    def _finish(self, finish: Finish, answer: AnswerReader) -> Iterator[WrittenEvent]:
        cut = finish.reason == "length"
        status = "incomplete" if cut else "completed"
        yield from self._close(status)
        for call in answer.calls:
            yield from self._call(call["id"], **call["function"])
        if not self.response["output"]:
            yield from self._open("message")
            yield from self._close(status)
        self.response |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": usage(finish.statistics, answer.reasoning_tokens),
            "rapid": rapid_object(finish.statistics) | {"ignored": self._body.ignored},
        }
        yield f"response.{status}", {"response": self.response}

    def _say(self, kind: str, text: str) -> Iterator[WrittenEvent]:
        """``text`` as more of the open item, if that is of this ``kind``, or as the beginning of a new one."""
        if not text:
            return
        if self._item is None or self._item["type"] != kind:
            yield from self._close("completed")
            yield from self._open(kind)
        assert self._item is not None
        self._item["content"][0]["text"] += text
        yield f"response.{_PARTS[kind]}.delta", {**self._where(), "delta": text} | _no_logprobs(kind)

    def _open(self, kind: str) -> Iterator[WrittenEvent]:
        item: dict[str, Any] = {"id": _named(_IDS[kind]), "type": kind, "status": "in_progress"}
        more: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        item |= more
        yield "response.output_item.added", {"output_index": self._index, "item": {**item, "content": []}}
        self._item = {**item, "content": [_part(kind)]}
        yield "response.content_part.added", {**self._where(), "part": _part(kind)}

    def _close(self, status: str) -> Iterator[WrittenEvent]:
        if self._item is None:
            return
        item, kind = self._item | {"status": status}, self._item["type"]
        [part] = item["content"]
        yield f"response.{_PARTS[kind]}.done", {**self._where(), "text": part["text"]} | _no_logprobs(kind)
        yield "response.content_part.done", {**self._where(), "part": part}
        yield "response.output_item.done", {"output_index": self._index, "item": item}
        self.response["output"].append(item)
        self._item = None

    def _call(self, call_id: str, *, name: str, arguments: str) -> Iterator[WrittenEvent]:
        item = {"id": _named("fc"), "type": "function_call", "status": "completed", "call_id": call_id}
        item |= {"name": name, "arguments": arguments}
        at = {"output_index": self._index}
        where = {"item_id": item["id"], **at}
        yield "response.output_item.added", {**at, "item": {**item, "arguments": "", "status": "in_progress"}}
        yield "response.function_call_arguments.delta", {**where, "delta": arguments}
        yield "response.function_call_arguments.done", {**where, "arguments": arguments, "name": name}
        yield "response.output_item.done", {**at, "item": item}
        self.response["output"].append(item)

    @property
    def _index(self) -> int:
        """The place of the item that is being written."""
        return len(self.response["output"])

    def _where(self) -> dict[str, Any]:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": self._index, "content_index": 0}


def usage(statistics: Statistics, reasoning_tokens: int) -> dict[str, Any]:
    """OpenAI's `usage` of a response."""
    read, written = statistics.prompt_tokens, statistics.emitted
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": statistics.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": read + written,
    }


def _named(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def _part(kind: str) -> dict[str, Any]:
    """The only part of an item of a ``kind``, empty."""
    more: dict[str, Any] = {"annotations": []} if kind == "message" else {}
    return {"type": _PARTS[kind], "text": ""} | more | _no_logprobs(kind)


def _no_logprobs(kind: str) -> dict[str, Any]:
    return {"logprobs": []} if kind == "message" else {}


def server_sent_response(
    writer: ResponseWriter, events: AsyncGenerator[Event | None, None], store: Store
) -> AsyncGenerator[str, None]:
    """The response as server-sent events, with a comment for each None; it is stored before its last event."""
    number = 0

    def sent(kind: str, fields: dict[str, Any]) -> str:
        nonlocal number
        number += 1
        data = {"type": kind, "sequence_number": number - 1, **fields}
        return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"

    async def tell(event: Event) -> AsyncGenerator[str, None]:
        for kind, fields in writer.events(event):
            if kind in ("response.completed", "response.incomplete"):
                await store(writer.response, writer.said())
            yield sent(kind, fields)

    return told(events, tell, lambda error: sent(*writer.failed(error)))
