"""Answers over HTTP: whole, and as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator
from itertools import chain
from typing import Any

from deployments.http.answers import AnswerReader, Said
from deployments.http.errors import server_sent_error
from deployments.http.logprobs import TextLogprobs, chat_logprobs, joined, prompt_logprobs
from deployments.http.streaming import told
from deployments.schemas.chat import ChatRequest
from deployments.schemas.completions import Completion
from deployments.schemas.events import Event, PromptScored, Started, rapid_object, round_object, usage
from deployments.schemas.text import TextRequest
from rapid.events import Delta, Finish, PromptToken, Statistics, TokenLogprobs


class Choice:
    """One choice of an answer: turns its events into text, calls and log-probabilities."""

    def __init__(self, completion: Completion, started: Started) -> None:
        self._completion, self.echoed = completion, started.echoed
        self._is_chat = isinstance(completion, ChatRequest)
        self._has_logprobs, self._logprobs = completion.num_logprobs is not None, TextLogprobs()
        self.answer = AnswerReader(completion, started)
        self._is_legacy = isinstance(completion, ChatRequest) and bool(completion.functions)
        self._traced: list[dict[str, float]] = []  # the chunks that the trace has named
        self.statistics: Statistics | None = None  # at the end

    def read(self, event: Delta | Finish) -> Said:
        """What ``event`` adds to the answer."""
        if isinstance(event, Finish):
            self.statistics = event.statistics
        return self.answer.read(event)

    def round(self, delta: Delta) -> dict[str, Any]:
        """The trace of ``delta``; the retrieved chunks are in it where they changed."""
        changed, self._traced = delta.chunks if delta.chunks != self._traced else None, delta.chunks
        return {"rapid_round": round_object(delta, changed)}

    def calls(self, *, in_stream: bool = False) -> dict[str, Any]:
        """The calls as fields of a message, or of a stream's delta; empty before the end of the choice."""
        called = self.answer.calls
        if not called:
            return {}
        if self._is_legacy:
            return {"function_call": called[0]["function"]}
        return {"tool_calls": [{"index": i, **call} if in_stream else call for i, call in enumerate(called)]}

    def reason(self, finish: Finish) -> str:
        called = "function_call" if self._is_legacy else "tool_calls"
        return called if self.answer.calls and finish.reason == "stop" else finish.reason

    def logprobs(self, entries: list[TokenLogprobs]) -> dict[str, Any] | None:
        """``entries`` in the endpoint's form; None where the request asks for none."""
        if not self._has_logprobs:
            return None
        return chat_logprobs(entries) if self._is_chat else self._logprobs.written(entries)

    def prompt(self, tokens: list[PromptToken]) -> dict[str, Any]:
        """What the choice says of the prompt's ``tokens``: its text with their log-probabilities, and vLLM's list."""
        completion, shown = self._completion, dict[str, Any]()
        if isinstance(completion, TextRequest) and completion.echo:
            shown = {"text": self.echoed, "logprobs": None}
            if self._has_logprobs:
                shown["logprobs"] = self._logprobs.echoed(tokens, self.echoed)
        if isinstance(completion, TextRequest) and completion.prompt_logprobs is not None:
            shown["prompt_logprobs"] = prompt_logprobs(tokens)
        return shown


class ResponseFormatter:
    """Formats one answer for its endpoint, whole or in chunks.

    With n = 1 the `rapid` object belongs to the answer, on the last chunk of a stream; else each choice has its own.
    """

    def __init__(self, completion: Completion) -> None:
        self.completion = completion
        self.is_chat = isinstance(completion, ChatRequest)
        self.choices: dict[int, Choice] = {}  # of the prompts that are known to be read
        self._num_choices = completion.num_written * completion.num_prompts
        self._scored: dict[int, list[PromptToken]] = {}  # of each choice's prompt
        self._num_read = self._num_written = 0
        self._id = ("chatcmpl-" if self.is_chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())

    @property
    def statistics(self) -> list[list[Statistics]]:
        """Of the choices that have ended, by prompt."""
        n = self.completion.num_written
        ended = {i: choice.statistics for i, choice in sorted(self.choices.items()) if choice.statistics is not None}
        return [
            own for p in range(self.completion.num_prompts) if (own := [s for i, s in ended.items() if i // n == p])
        ]

    @property
    def is_finished(self) -> bool:
        """Whether every choice has ended."""
        return sum(map(len, self.statistics)) == self._num_choices

    def begin(self, started: Started) -> list[dict[str, Any]]:
        """The chunks before any text of a prompt's choices: the role of a chat, the echoed prompt of a completion."""
        indices = self._of_prompt(started.prompt)
        self.choices |= {i: Choice(self.completion, started) for i in indices}
        self._num_read += started.prompt_tokens
        if self.is_chat:
            return [self._chunk(i, {"delta": {"role": "assistant", "content": ""}, "logprobs": None}) for i in indices]
        if not started.echoed or self.completion.num_prompt_logprobs is not None:  # it comes with these
            return []
        return [self._chunk(i, {"text": started.echoed, "logprobs": None}) for i in indices]

    def _of_prompt(self, prompt: int) -> range:
        """The choices of a prompt."""
        n = self.completion.num_written
        return range(prompt * n, (prompt + 1) * n)

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """The chunks of a stream for ``event``."""
        if isinstance(event, Started):
            return self.begin(event)
        if isinstance(event, PromptScored):
            asked = [(i, self.choices[i].prompt(event.tokens)) for i in self._of_prompt(event.prompt)]
            return [self._chunk(i, {"text": "", "logprobs": None} | shown) for i, shown in asked]
        index, choice = event.choice, self.choices[event.choice]
        self._num_written += len(event.tokens) if isinstance(event, Delta) else 0
        said, logprobs = choice.read(event), choice.logprobs(event.logprobs)
        sent = []
        traced = choice.round(event) if isinstance(event, Delta) and self.completion.rapid.trace else {}
        if any(said) or event.logprobs or traced:
            sent.append(self._part(index, said, logprobs) | traced)
        if isinstance(event, Finish):
            if calls := choice.calls(in_stream=True):
                sent.append(self._chunk(index, {"delta": calls, "logprobs": None}))
            sent.append(self._part(index, Said("", ""), None, choice.reason(event), event.statistics))
        return sent

    def whole(self, events: list[Event]) -> dict[str, Any]:
        """The whole answer. The ``events`` of each choice are in order."""
        by_choice: dict[int, list[Delta | Finish]] = {i: [] for i in range(self._num_choices)}
        for event in events:
            if isinstance(event, Started):
                self.begin(event)
            elif isinstance(event, PromptScored):
                self._scored |= dict.fromkeys(self._of_prompt(event.prompt), event.tokens)
            else:
                by_choice[event.choice].append(event)
                if isinstance(event, Finish):  # those that are not given out count as well
                    self.choices[event.choice].statistics = event.statistics
        kind = "chat.completion" if self.is_chat else "text_completion"
        chosen = [self._best([by_choice[i] for i in self._of_prompt(p)]) for p in range(self.completion.num_prompts)]
        return self._body(kind, *(self._whole(i, one) for i, one in enumerate(chain.from_iterable(chosen))))

    def _best(self, choices: list[list[Delta | Finish]]) -> list[list[Delta | Finish]]:
        """The ``n`` of a prompt's ``choices`` whose tokens are the likeliest on average, the best first."""
        if len(choices) == self.completion.n:
            return choices
        return sorted(choices, key=_mean_logprob, reverse=True)[: self.completion.n]

    def _whole(self, index: int, events: list[Delta | Finish]) -> dict[str, Any]:
        finish = events[-1]
        assert isinstance(finish, Finish)
        choice = self.choices[finish.choice]
        said = [choice.read(event) for event in events]
        text, reasoning = "".join(each.text for each in said), "".join(each.reasoning for each in said)
        prompt = choice.prompt(self._scored[finish.choice]) if finish.choice in self._scored else {}
        logprobs = choice.logprobs([entry for event in events for entry in event.logprobs])
        if logprobs and prompt.get("logprobs"):
            logprobs = joined([prompt["logprobs"], logprobs])
        shown: dict[str, Any] = prompt | {"text": choice.echoed + text, "logprobs": logprobs}
        if self.is_chat:
            calls = choice.calls()
            message = {"role": "assistant", "content": text if text or not calls else None}
            if reasoning:
                message["reasoning_content"] = reasoning
            shown = {"message": message | calls, "logprobs": logprobs}
        return self._choice(index, shown, choice.reason(finish), finish.statistics)

    def _part(
        self, index: int, said: Said, logprobs: Any, reason: str | None = None, own: Any = None
    ) -> dict[str, Any]:
        delta = {"reasoning_content": said.reasoning, "content": said.text}
        shown = {"delta": {k: v for k, v in delta.items() if v}} if self.is_chat else {"text": said.text}
        return self._chunk(index, shown | {"logprobs": logprobs}, reason, own)

    def _chunk(self, index: int, shown: dict[str, Any], reason: str | None = None, own: Any = None) -> dict[str, Any]:
        return self._body(self._kind_of_chunk, self._choice(index, shown, reason, own))

    def _choice(
        self, index: int, shown: dict[str, Any], reason: str | None, own: Statistics | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **shown, "finish_reason": reason}
        return choice | ({"rapid": self._rapid(own)} if own and self._num_choices > 1 else {})

    def _body(self, kind: str, *choices: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.completion.model,
            "choices": list(choices),
        }

    @property
    def _kind_of_chunk(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def usage(self) -> dict[str, Any]:
        """The usage of the whole answer."""
        thought = [choice.answer.reasoning_tokens for choice in self.choices.values()]
        details = {"completion_tokens_details": {"reasoning_tokens": sum(thought)}} if any(thought) else {}
        return usage(*self.statistics) | details

    def usage_so_far(self) -> dict[str, int]:
        """The usage while the answer is written."""
        read, written = self._num_read, self._num_written
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream whose `stream_options` ask for the usage."""
        return self._body(self._kind_of_chunk) | {"usage": self.usage()} | self.summary()

    def summary(self) -> dict[str, Any]:
        """The `rapid` object of an answer with one choice."""
        return {"rapid": self._rapid(self.statistics[0][0])} if self._num_choices == 1 else {}

    def _rapid(self, own: Statistics) -> dict[str, Any]:
        return rapid_object(own) | {"ignored": self.completion.ignored}


def _mean_logprob(events: list[Delta | Finish]) -> float:
    logprobs = [entry.chosen.logprob for event in events for entry in event.logprobs]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0


def server_sent(formatter: ResponseFormatter, events: AsyncGenerator[Event | None, None]) -> AsyncGenerator[str, None]:
    """The answer as server-sent events, with a comment for each None. The `rapid` object is on the last chunk."""
    options = formatter.completion.stream_options

    def sent(body: dict[str, Any]) -> str:
        more = {}
        if options.include_usage and "usage" not in body:
            more = {"usage": formatter.usage_so_far() if options.continuous_usage_stats else None}
        return f"data: {json.dumps(body | more, ensure_ascii=False)}\n\n"

    async def tell(event: Event) -> AsyncGenerator[str, None]:
        chunks = formatter.chunks(event)
        if formatter.is_finished and options.include_usage:
            chunks.append(formatter.usage_chunk())
        elif formatter.is_finished:
            chunks[-1] |= formatter.summary()
        for chunk in chunks:
            yield sent(chunk)

    return told(events, tell, server_sent_error, end="data: [DONE]\n\n")
