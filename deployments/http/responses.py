"""How answers look over HTTP: whole, and as server-sent events."""

import asyncio
import codecs
import json
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from deployments.http.errors import server_sent_error
from deployments.schemas.completions import ChatRequest, Completion
from deployments.schemas.events import Events, Started, rapid_object, round_object, usage
from deployments.schemas.tools import CallReader
from rapid.events import Delta, Finish, NamedToken, Statistics, TokenLogprobs


class Choice:
    """One of an answer's choices, as it is written: what is to be shown of its events."""

    def __init__(self, completion: Completion, began: Started) -> None:
        self.is_chat = isinstance(completion, ChatRequest)
        self.has_logprobs = bool(completion.logprobs) if self.is_chat else completion.logprobs is not None
        self._calls = CallReader(completion.tools_in_use, began.calls) if began.calls else None
        self._called: list[dict[str, Any]] = []
        self._offset, self._decoder = 0, codecs.getincrementaldecoder("utf-8")("ignore")
        self._told: list[dict[str, float]] = []  # which chunks a trace has named
        self.statistics: Statistics | None = None  # at the end

    def text_of(self, event: Delta | Finish) -> str:
        """The text that ``event`` brings, without what is part of a call."""
        text = self._calls.push(event.text) if self._calls else event.text
        if isinstance(event, Finish):
            self.statistics = event.statistics
            if self._calls:
                rest, self._called = self._calls.finish()
                text += rest
        return text

    def round(self, delta: Delta) -> dict[str, Any]:
        """What a trace says of ``delta``; the retrieved chunks once they are known."""
        news, self._told = delta.chunks if delta.chunks != self._told else None, delta.chunks
        return {"rapid_round": round_object(delta, news)}

    def calls(self) -> list[dict[str, Any]]:
        """The calls, known at the end."""
        return self._called

    def reason(self, finish: Finish) -> str:
        return "tool_calls" if self._called and finish.reason == "stop" else finish.reason

    def logprobs(self, entries: list[TokenLogprobs]) -> dict[str, Any] | None:
        """``entries`` in the endpoint's form; None where none were asked for."""
        if not self.has_logprobs:
            return None
        if self.is_chat:
            content = [_token(chosen) | {"top_logprobs": [_token(t) for t in top]} for chosen, top in entries]
            return {"content": content, "refusal": None}
        offsets = []
        for chosen, _ in entries:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(chosen.spelled))
        return {
            "tokens": [_spelled(chosen) for chosen, _ in entries],
            "token_logprobs": [chosen.logprob for chosen, _ in entries],
            "top_logprobs": [{_spelled(t): t.logprob for t in (*top, chosen)} for chosen, top in entries],
            "text_offset": offsets,
        }


def _spelled(token: NamedToken) -> str:
    """A token's text; its bytes, as OpenAI writes them, where they are no whole characters."""
    try:
        return token.spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.spelled)


def _token(token: NamedToken) -> dict[str, Any]:
    return {"token": _spelled(token), "logprob": token.logprob, "bytes": list(token.spelled)}


class ResponseFormatter:
    """How one endpoint's answer looks, whole and in chunks.

    With n = 1 the `rapid` object is the answer's, on the last chunk of a stream; else each choice has its own.
    """

    def __init__(self, completion: Completion, began: Started) -> None:
        self.completion, self._echoed = completion, began.echoed
        self.is_chat = isinstance(completion, ChatRequest)
        self.choices = [Choice(completion, began) for _ in range(completion.n)]
        self._id = ("chatcmpl-" if self.is_chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())

    @property
    def statistics(self) -> list[Statistics]:
        return [choice.statistics for choice in self.choices if choice.statistics is not None]

    def first_chunks(self) -> list[dict[str, Any]]:
        """What comes before any text: of a chat the role, of a completion the prompt that is to be repeated."""
        indices = range(len(self.choices))
        if self.is_chat:
            return [self._chunk(i, {"delta": {"role": "assistant", "content": ""}, "logprobs": None}) for i in indices]
        return [self._chunk(i, {"text": self._echoed, "logprobs": None}) for i in indices if self._echoed]

    def chunks(self, event: Delta | Finish) -> list[dict[str, Any]]:
        """What a stream says of ``event``."""
        index, choice = event.choice, self.choices[event.choice]
        text, logprobs = choice.text_of(event), choice.logprobs(event.logprobs)
        sent = []
        traced = choice.round(event) if isinstance(event, Delta) and self.completion.rapid.trace else {}
        if text or event.logprobs or traced:
            sent.append(self._part(index, text, logprobs) | traced)
        if isinstance(event, Finish):
            if calls := choice.calls():
                delta = {"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]}
                sent.append(self._chunk(index, {"delta": delta, "logprobs": None}))
            sent.append(self._part(index, "", None, choice.reason(event), event.statistics))
        return sent

    def whole(self, events: list[Delta | Finish]) -> dict[str, Any]:
        """The answer that ``events`` make, each choice's in order."""
        return self._body("chat.completion" if self.is_chat else "text_completion", *map(self._whole, self._by(events)))

    def _by(self, events: list[Delta | Finish]) -> list[list[Delta | Finish]]:
        return [[event for event in events if event.choice == i] for i in range(len(self.choices))]

    def _whole(self, events: list[Delta | Finish]) -> dict[str, Any]:
        finish = events[-1]
        assert isinstance(finish, Finish)
        choice = self.choices[finish.choice]
        text = "".join(choice.text_of(event) for event in events)
        shown: dict[str, Any] = {"text": self._echoed + text}
        if self.is_chat:
            calls = choice.calls()
            message = {"role": "assistant", "content": text if text or not calls else None}
            shown = {"message": message | ({"tool_calls": calls} if calls else {})}
        shown["logprobs"] = choice.logprobs([entry for event in events for entry in event.logprobs])
        return self._choice(finish.choice, shown, choice.reason(finish), finish.statistics)

    def _part(self, index: int, text: str, logprobs: Any, reason: str | None = None, own: Any = None) -> dict[str, Any]:
        shown = {"delta": {"content": text} if text else {}} if self.is_chat else {"text": text}
        return self._chunk(index, shown | {"logprobs": logprobs}, reason, own)

    def _chunk(self, index: int, shown: dict[str, Any], reason: str | None = None, own: Any = None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return self._body(kind, self._choice(index, shown, reason, own))

    def _choice(
        self, index: int, shown: dict[str, Any], reason: str | None, own: Statistics | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **shown, "finish_reason": reason}
        return choice | ({"rapid": rapid_object(own)} if own and len(self.choices) > 1 else {})

    def _body(self, kind: str, *choices: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.completion.model,
            "choices": list(choices),
        }

    def summary(self) -> dict[str, Any]:
        """The `rapid` object of an answer with one choice."""
        return {"rapid": rapid_object(self.statistics[0])} if len(self.choices) == 1 else {}


async def server_sent(formatter: ResponseFormatter, first: Delta | Finish, events: Events) -> AsyncGenerator[str, None]:
    """The answer as server-sent events. The `rapid` object is on the last chunk, whichever that is."""
    include_usage = formatter.completion.stream_options.include_usage

    def sent(body: dict[str, Any]) -> str:
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    more = {"usage": None} if include_usage else {}
    try:
        for chunk in formatter.first_chunks():
            yield sent(chunk | more)
        async with aclosing(_chained(first, events)) as all_events:
            async for event in all_events:
                *before, last = formatter.chunks(event) or [None]
                for chunk in before:
                    yield sent(chunk | more)
                if last is None:
                    continue
                ends = isinstance(event, Finish) and len(formatter.statistics) == len(formatter.choices)
                yield sent(last | more | (formatter.summary() if ends and not include_usage else {}))
        if include_usage:
            yield sent(last | {"choices": [], "usage": usage(*formatter.statistics)} | formatter.summary())
    except asyncio.CancelledError:
        raise
    except Exception as error:
        yield server_sent_error(error)
    yield "data: [DONE]\n\n"


async def _chained(first: Delta | Finish, rest: Events) -> Events:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event
