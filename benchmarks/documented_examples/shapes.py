"""What is wrong with an answer: its shape by OpenAI's own client, and whether it is what the body asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from openai import types as openai
from openai.types import chat, responses
from pydantic import TypeAdapter, ValidationError

from benchmarks.documented_examples.examples import Example
from benchmarks.structured import valid

_WHOLE: dict[str, Any] = {
    "/v1/chat/completions": chat.ChatCompletion,
    "/v1/completions": openai.Completion,
    "/v1/embeddings": openai.CreateEmbeddingResponse,
    "/v1/responses": responses.Response,
}
_CHUNK: dict[str, Any] = {
    "/v1/chat/completions": chat.ChatCompletionChunk,
    "/v1/completions": openai.Completion,
    "/v1/responses": responses.ResponseStreamEvent,
}
_MESSAGE = ("id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage")


class Choice(NamedTuple):
    """A choice in one form for all APIs. ``calls`` are (name, arguments); ``is_cut``: it ended with its length."""

    text: str
    calls: list[tuple[str, str]]
    is_cut: bool


def faults(example: Example, answer: Any, description: dict[str, Any]) -> Iterator[str]:
    """What is wrong with ``answer``; ``description`` is the server's /openapi.json."""
    body, whole = example.body or {}, answer
    if isinstance(answer, list):
        yield from _stream_faults(example.path, answer)
        whole = joined(example.path, answer)
    elif example.path in _WHOLE:
        yield from _misshapen(_WHOLE[example.path], answer)
    if example.path == "/v1/embeddings":
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        if [each["index"] for each in whole["data"]] != list(range(len(texts))):
            yield f"{len(whole['data'])} vectors of {len(texts)} texts"
    elif example.path == "/v1/rerank":
        scores = [each["relevance_score"] for each in whole["results"]]
        if scores != sorted(scores, reverse=True) or len(scores) != min(body["top_n"], len(body["documents"])):
            yield f"not the {body['top_n']} best in order: {scores}"
    elif example.path.endswith("_tokens"):
        if not whole["input_tokens"] > 0:
            yield "no tokens were counted"
    elif example.path in _WHOLE or example.path == "/v1/messages":
        choices = choices_of(whole)
        yield from _choice_faults(body, choices, whole)
        known = _properties(description, example.path)
        if lost := body.keys() - known - set(whole["rapid"]["ignored"]):
            yield f"neither known nor ignored: {sorted(lost)}"


def _misshapen(kind: Any, value: Any) -> Iterator[str]:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        yield f"openai cannot read {'.'.join(map(str, first['loc']))}: {first['msg']}"


def _properties(description: dict[str, Any], path: str) -> set[str]:
    schema = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return set(schema["properties"])


def _stream_faults(path: str, events: list[tuple[str, Any]]) -> Iterator[str]:
    """What is wrong with the order or the shape of a stream's events."""
    kinds = [event for event, _ in events]
    if "error" in kinds:
        yield f"the stream ended with an error: {events[-1]}"
    if path == "/v1/messages":
        depth = [{"content_block_start": 1, "content_block_stop": -1}.get(kind, 0) for kind in kinds]
        if kinds[0] != "message_start" or kinds[-2:] != ["message_delta", "message_stop"] or sum(depth):
            yield f"not the events of a message: {kinds}"
        return
    if path == "/v1/responses":
        if [data["sequence_number"] for _, data in events] != list(range(len(events))):
            yield "the events are not numbered in order"
        if kinds[0] != "response.created" or kinds[-1] not in ("response.completed", "response.incomplete"):
            yield f"not the events of a response: {kinds}"
    elif events[-1][1] != "[DONE]":
        yield f"the stream ends with {events[-1]}"
    for _, data in events:
        # A completion's reason is null before its end, in OpenAI's streams too; their type says that it never is.
        is_begun = path == "/v1/completions" and data != "[DONE]" and data["choices"][0]["finish_reason"] is None
        if data != "[DONE]" and not is_begun:
            yield from _misshapen(_CHUNK[path], data)


def joined(path: str, events: list[tuple[str, Any]]) -> dict[str, Any]:
    """The whole answer that a stream's events make."""
    if path == "/v1/responses":
        return dict(events[-1][1]["response"])
    if path == "/v1/messages":
        return _joined_message([data for _, data in events])
    chunks = [data for _, data in events if data != "[DONE]"]
    choices: dict[int, dict[str, Any]] = {}
    for piece in (choice for chunk in chunks for choice in chunk["choices"]):
        choice = choices.setdefault(piece["index"], {"text": "", "message": {"content": "", "tool_calls": []}})
        choice["finish_reason"] = piece["finish_reason"]
        choice["text"] += piece.get("text", "")
        delta = piece.get("delta", {})
        choice["message"]["content"] += delta.get("content") or ""
        choice["message"]["tool_calls"] += delta.get("tool_calls", [])
    return {"choices": [choices[i] for i in sorted(choices)], "rapid": chunks[-1]["rapid"]}


def _joined_message(events: list[dict[str, Any]]) -> dict[str, Any]:
    message = dict(events[0]["message"]) | {"content": []}
    for event in events:
        if event["type"] == "content_block_start":
            message["content"].append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            block, delta = message["content"][event["index"]], event["delta"]
            if delta["type"] == "input_json_delta":
                block["input"] = json.loads(delta["partial_json"])
            else:
                block["text"] += delta["text"]
        elif event["type"] == "message_delta":
            message |= event["delta"] | {"usage": event["usage"], "rapid": event["rapid"]}
    return message


def choices_of(whole: dict[str, Any]) -> list[Choice]:
    """The choices of an answer of any of the APIs."""
    if whole.get("object") == "response":
        output = whole["output"]
        text = "".join(part["text"] for item in output if item["type"] == "message" for part in item["content"])
        calls = [(item["name"], item["arguments"]) for item in output if item["type"] == "function_call"]
        return [Choice(text, calls, whole["status"] == "incomplete")]
    if whole.get("type") == "message":
        blocks = whole["content"]
        text = "".join(block["text"] for block in blocks if block["type"] == "text")
        calls = [(block["name"], json.dumps(block["input"])) for block in blocks if block["type"] == "tool_use"]
        return [Choice(text, calls, whole["stop_reason"] == "max_tokens")]
    found = []
    for choice in whole["choices"]:
        message = choice.get("message", {})
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]
        text = message.get("content") or choice.get("text") or ""
        found.append(Choice(text, calls, choice["finish_reason"] == "length"))
    return found


def _choice_faults(body: dict[str, Any], choices: list[Choice], whole: dict[str, Any]) -> Iterator[str]:
    """Whether the choices are as many as, as long as and in the form that the body asks for."""
    if len(choices) != body.get("n", 1):
        yield f"{len(choices)} choices"
    if whole.get("type") == "message" and (missing := [name for name in _MESSAGE if name not in whole]):
        yield f"a message without {missing}"
    most, used = body.get("max_tokens"), whole.get("usage", {})
    if most is not None and used.get("completion_tokens", used.get("output_tokens", 0)) > most:
        yield f"more than {most} tokens: {used}"
    for choice, told in zip(choices, whole.get("choices", [{}]), strict=True):
        yield from _call_faults(body, choice)
        if not choice.is_cut and not choice.calls:
            yield from _form_faults(body, choice.text)
        stops = body.get("stop", body.get("stop_sequences", []))
        if any(stop in choice.text for stop in ([stops] if isinstance(stops, str) else stops)):
            yield f"the text goes on behind its stop: {choice.text!r}"
        if body.get("logprobs"):
            entries = told["logprobs"]["content"]
            spelt = b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace")
            if spelt.rstrip("\ufffd") != choice.text.rstrip("\ufffd"):  # the last character may be cut in half
                yield "the tokens with log-probabilities are not those of the text"
            if {len(entry["top_logprobs"]) for entry in entries} != {body["top_logprobs"]}:
                yield f"not {body['top_logprobs']} log-probabilities a token"


def _call_faults(body: dict[str, Any], choice: Choice) -> Iterator[str]:
    tools = [tool.get("function", tool) for tool in body.get("tools", [])]
    schemas = {tool["name"]: tool.get("parameters", tool.get("input_schema")) for tool in tools}
    forced = isinstance(body.get("tool_choice"), dict)
    for name, arguments in choice.calls:
        if name not in schemas or not valid(arguments, schemas[name] if forced else {"type": "object"}):
            yield f"no call of a tool: {name}({arguments})"
    if forced and not choice.is_cut and [name for name, _ in choice.calls] != [body["tool_choice"]["function"]["name"]]:
        yield f"not the call that was asked for: {choice.calls}"


def _form_faults(body: dict[str, Any], text: str) -> Iterator[str]:
    structured = body.get("structured_outputs", {})
    forms = (body.get("response_format", {}), body.get("output_config", {}).get("format", {}))
    schemas = [form.get("json_schema", form).get("schema") for form in forms if form]
    if any(schema is not None and not valid(text, schema) for schema in schemas):
        yield f"not what the schema allows: {text!r}"
    allowed = body.get("guided_choice", structured.get("choice"))
    if allowed and text not in allowed:
        yield f"none of the choices: {text!r}"
    # A stop string ends the text before the expression ends.
    pattern = structured.get("regex")
    if pattern and not re.fullmatch(pattern, text + "".join(body.get("stop", []))):
        yield f"not what the expression allows: {text!r}"
