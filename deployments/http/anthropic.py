"""Anthropic's Messages API over the same service: a request becomes a chat, and its events Anthropic's."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from deployments.http.errors import anthropic_error, as_rapid_error
from deployments.schemas.chat import ChatRequest
from deployments.schemas.events import Started, rapid_object
from deployments.schemas.tools import CallReader
from rapid.events import Delta, Finish, Statistics


def usage(statistics: Statistics) -> dict[str, int]:
    """Anthropic's `usage`: tokens of the prompt that were in the cache do not count as input again."""
    cached = statistics.cached_tokens
    return {
        "input_tokens": statistics.prompt_tokens - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": statistics.emitted,
    }


class MessageWriter:
    """Writes the answer to ``completion``, whole or as events. ``ignored`` are the body's fields without effect."""

    def __init__(self, completion: ChatRequest, ignored: list[str]) -> None:
        self._completion, self._ignored = completion, ignored
        self._calls: CallReader | None = None
        self._called: list[dict[str, Any]] = []
        self._num_blocks = 0
        self._is_open = False  # whether a block of text is
        self._id = f"msg_{uuid.uuid4().hex}"

    def events(self, event: Started | Delta | Finish) -> Iterator[tuple[str, dict[str, Any]]]:
        """(type, fields) of the events of a stream for ``event``."""
        if isinstance(event, Started):
            self._calls = CallReader(self._completion.tools_in_use, event.calls) if event.calls else None
            begun = {"input_tokens": event.prompt_tokens, "output_tokens": 0}
            yield "message_start", {"message": self._message([], None, None, begun)}
            return
        text = self._text_of(event)
        if text:
            if not self._is_open:
                yield from self._begin({"type": "text", "text": ""})
                self._is_open = True
            yield self._delta({"type": "text_delta", "text": text})
        if isinstance(event, Finish):
            if self._is_open:
                yield self._end()
            for call in self._called:
                function = call["function"]
                yield from self._begin({"type": "tool_use", "id": call["id"], "name": function["name"], "input": {}})
                yield self._delta({"type": "input_json_delta", "partial_json": function["arguments"]})
                yield self._end()
            ended = {"stop_reason": self._reason(event), "stop_sequence": _sequence(event)}
            yield "message_delta", {"delta": ended, "usage": usage(event.statistics)} | self._rapid(event.statistics)
            yield "message_stop", {}

    def whole(self, events: list[Started | Delta | Finish]) -> dict[str, Any]:
        """The whole message."""
        text = ""
        for event in events:
            if isinstance(event, Started):
                self._calls = CallReader(self._completion.tools_in_use, event.calls) if event.calls else None
            else:
                text += self._text_of(event)
        finish = events[-1]
        assert isinstance(finish, Finish)
        blocks: list[dict[str, Any]] = [{"type": "text", "text": text}] if text or not self._called else []
        for call in self._called:
            function = call["function"]
            given = json.loads(function["arguments"])
            blocks.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": given})
        message = self._message(blocks, self._reason(finish), _sequence(finish), usage(finish.statistics))
        return message | self._rapid(finish.statistics)

    def _text_of(self, event: Delta | Finish) -> str:
        text = self._calls.push(event.text) if self._calls else event.text
        if isinstance(event, Finish) and self._calls:
            rest, self._called = self._calls.finish()
            text += rest
        return text

    def _reason(self, finish: Finish) -> str:
        if finish.reason == "length":
            return "max_tokens"
        if self._called:
            return "tool_use"
        return "end_turn" if _sequence(finish) is None else "stop_sequence"

    def _message(self, content: list[Any], reason: str | None, sequence: str | None, used: Any) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._completion.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": used,
        }

    def _rapid(self, statistics: Statistics) -> dict[str, Any]:
        return {"rapid": rapid_object(statistics) | {"ignored": self._ignored}}

    def _begin(self, block: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "content_block_start", {"index": self._num_blocks, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "content_block_delta", {"index": self._num_blocks, "delta": delta}

    def _end(self) -> tuple[str, dict[str, Any]]:
        self._num_blocks += 1
        return "content_block_stop", {"index": self._num_blocks - 1}


def _sequence(finish: Finish) -> str | None:
    return finish.stop if isinstance(finish.stop, str) else None


async def server_sent_message(
    writer: MessageWriter, events: AsyncGenerator[Started | Delta | Finish | None, None]
) -> AsyncGenerator[str, None]:
    """The message as server-sent events, with a ping for each None."""

    def sent(kind: str, fields: dict[str, Any]) -> str:
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, ensure_ascii=False)}\n\n"

    try:
        async with aclosing(events):
            async for event in events:
                if event is None:
                    yield sent("ping", {})
                else:
                    for kind, fields in writer.events(event):
                        yield sent(kind, fields)
    except asyncio.CancelledError:
        raise
    except Exception as error:
        yield f"event: error\ndata: {json.dumps(anthropic_error(as_rapid_error(error)), ensure_ascii=False)}\n\n"
