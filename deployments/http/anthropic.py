"""Anthropic's Messages API over the same service: a request becomes a chat, and its events Anthropic's."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from deployments.http.answers import AnswerReader
from deployments.http.errors import anthropic_error, as_rapid_error
from deployments.http.streaming import told
from deployments.schemas.chat import ChatRequest
from deployments.schemas.events import Event, Started, rapid_object
from rapid.events import Delta, Finish, Statistics

WrittenEvent = tuple[str, dict[str, Any]]


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
        self._answer: AnswerReader | None = None
        self._blocks: list[dict[str, Any]] = []  # the last of them is being written while it ``_is_open``
        self._is_open = False
        self._id = f"msg_{uuid.uuid4().hex}"

    def events(self, event: Event) -> Iterator[WrittenEvent]:
        """(type, fields) of the events of a stream for ``event``."""
        if isinstance(event, Started):
            self._answer = AnswerReader(self._completion, event)
            begun = {"input_tokens": event.prompt_tokens, "output_tokens": 0}
            yield "message_start", {"message": self._message([], None, None, begun)}
        elif isinstance(event, Delta | Finish) and self._answer is not None:
            said = self._answer.read(event)
            yield from self._say("thinking", said.reasoning)
            yield from self._say("text", said.text)
            if isinstance(event, Finish):
                yield from self._end()
                for call in self._answer.calls:
                    yield from self._call(call["id"], **call["function"])
                ended = {"stop_reason": self._reason(event), "stop_sequence": _sequence(event)}
                more = self._rapid(event.statistics)
                yield "message_delta", {"delta": ended, "usage": usage(event.statistics)} | more
                yield "message_stop", {}

    def whole(self, events: list[Event]) -> dict[str, Any]:
        """The whole message."""
        for event in events:
            for _ in self.events(event):  # which fill the blocks
                pass
        finish = events[-1]
        assert isinstance(finish, Finish)
        blocks = self._blocks or [{"type": "text", "text": ""}]
        message = self._message(blocks, self._reason(finish), _sequence(finish), usage(finish.statistics))
        return message | self._rapid(finish.statistics)

    def _say(self, kind: str, text: str) -> Iterator[WrittenEvent]:
        """``text`` as more of the open block, if that is of this ``kind``, or as the beginning of a new one."""
        if not text:
            return
        if not self._is_open or self._blocks[-1]["type"] != kind:
            yield from self._end()
            # Only its own server could check a signature, and this one reads no thinking again.
            yield self._begin({"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {}))
            self._is_open = True
        self._blocks[-1][kind] += text
        yield self._delta({"type": f"{kind}_delta", kind: text})

    def _call(self, call_id: str, *, name: str, arguments: str) -> Iterator[WrittenEvent]:
        yield self._begin({"type": "tool_use", "id": call_id, "name": name, "input": {}})
        self._blocks[-1]["input"] = json.loads(arguments)
        yield self._delta({"type": "input_json_delta", "partial_json": arguments})
        yield "content_block_stop", {"index": len(self._blocks) - 1}

    def _begin(self, block: dict[str, Any]) -> WrittenEvent:
        self._blocks.append(dict(block))
        return "content_block_start", {"index": len(self._blocks) - 1, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> WrittenEvent:
        return "content_block_delta", {"index": len(self._blocks) - 1, "delta": delta}

    def _end(self) -> Iterator[WrittenEvent]:
        if self._is_open:
            yield "content_block_stop", {"index": len(self._blocks) - 1}
        self._is_open = False

    def _reason(self, finish: Finish) -> str:
        if finish.reason == "length":
            return "max_tokens"
        if self._answer and self._answer.calls:
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


def _sequence(finish: Finish) -> str | None:
    return finish.stop if isinstance(finish.stop, str) else None


def server_sent_message(writer: MessageWriter, events: AsyncGenerator[Event | None, None]) -> AsyncGenerator[str, None]:
    """The message as server-sent events, with a ping for each None."""

    def sent(kind: str, fields: dict[str, Any]) -> str:
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, ensure_ascii=False)}\n\n"

    async def tell(event: Event) -> AsyncGenerator[str, None]:
        for kind, fields in writer.events(event):
            yield sent(kind, fields)

    def failed(error: Exception) -> str:
        return f"event: error\ndata: {json.dumps(anthropic_error(as_rapid_error(error)), ensure_ascii=False)}\n\n"

    return told(events, tell, failed, beat=sent("ping", {}))
