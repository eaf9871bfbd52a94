"""Anthropic's Messages API: the same answers as the chats', in its form."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import pytest

from deployments.schemas.anthropic import MessagesRequest
from deployments.schemas.messages import DocumentText, FilePart

HI = {"role": "user", "content": "Hi"}
ASK: dict[str, Any] = {"model": "bytes", "max_tokens": 12, "messages": [HI], "temperature": 0}
IMAGE = {"role": "user", "content": [{"type": "image", "source": {}}]}
LONG = {"role": "user", "content": "a" * 9000}


def post(url: str, path: str = "/v1/messages", **more: Any) -> httpx.Response:
    return httpx.post(url + path, json={**ASK, **more}, timeout=60)


def chat(url: str, **more: Any) -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/chat/completions", json={**ASK, **more}, timeout=60).json()
    return dict(answer)


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    events = [event.partition("\ndata: ") for event in answer.text.split("\n\n") if event]
    assert all(kind == f"event: {json.loads(data)['type']}" for kind, _, data in events)
    return [json.loads(data) for _, _, data in events]


@pytest.mark.parametrize("strategy", ["autoregressive", "lookup", "rapid"])
def test_a_message_is_the_chat_s_answer(bytes_url: str, strategy: str) -> None:
    rapid = {"strategy": strategy}
    message = post(bytes_url, system="Be brief.", rapid=rapid).json()
    messages = [{"role": "system", "content": "Be brief."}, *ASK["messages"]]
    expected = chat(bytes_url, messages=messages, rapid=rapid)
    assert message["content"] == [{"type": "text", "text": expected["choices"][0]["message"]["content"]}]
    reasons = {"length": "max_tokens", "stop": "end_turn"}
    assert message["stop_reason"] == reasons[expected["choices"][0]["finish_reason"]]
    used = message["usage"]
    assert used["input_tokens"] + used["cache_read_input_tokens"] == expected["usage"]["prompt_tokens"]
    assert used["output_tokens"] == expected["usage"]["completion_tokens"]
    assert message["rapid"]["strategy"] == strategy


def test_a_stream_of_one(bytes_url: str) -> None:
    whole, events = post(bytes_url).json(), events_of(post(bytes_url, stream=True))
    kinds = [event["type"] for event in events if event["type"] != "ping"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    text = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    assert text == whole["content"][0]["text"]
    assert events[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_the_stop_sequence_is_named(bytes_url: str) -> None:
    text = post(bytes_url).json()["content"][0]["text"]
    message = post(bytes_url, stop_sequences=["no such", text[3:5]]).json()
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", text[3:5])


TOOL = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}},
                                            "required": ["city"], "additionalProperties": False}}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called(bytes_url: str, stream: bool) -> None:
    answer = post(bytes_url, tools=[TOOL], tool_choice={"type": "any"}, max_tokens=80, stream=stream)
    assert answer.status_code == 200, answer.text
    if stream:
        events = events_of(answer)
        (begun,) = [event["content_block"] for event in events if event["type"] == "content_block_start"]
        (given,) = [event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta"]
        reason, block = events[-2]["delta"]["stop_reason"], {**begun, "input": json.loads(given)}
    else:
        reason, (block,) = answer.json()["stop_reason"], answer.json()["content"]
    assert (reason, block["type"], block["name"]) == ("tool_use", "tool_use", "weather")
    assert block["input"]["city"] in ("Rome", "Oslo")


def test_calls_results_and_documents_become_messages() -> None:
    pdf = base64.b64encode(b"%PDF").decode()
    blocks = [
        {"type": "document", "title": "A", "source": {"type": "text", "media_type": "text/plain", "data": "long"},
         "cache_control": {"type": "ephemeral"}},
        {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": pdf}},
        {"type": "text", "text": "What is it?"},
    ]  # fmt: skip
    body = MessagesRequest.model_validate({**ASK, "tools": [TOOL], "messages": [
        {"role": "user", "content": blocks},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "tool_use", "id": "t", "name": "weather", "input": {"city": "Oslo"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "snow"}]},
            {"type": "text", "text": "So?"}]},
    ]})  # fmt: skip
    first, called, result, last = body.chat().messages
    assert isinstance(first.content, list)
    assert [type(part) for part in first.content][1:3] == [DocumentText, FilePart]
    assert called.calls[0].function.arguments == '{"city": "Oslo"}'
    assert (result.role, result.tool_call_id, result.content, last.role) == ("tool", "t", "snow", "user")
    assert body.ignored == ["messages.content.cache_control", "messages.content.signature", "messages.content.thinking"]


def test_a_begun_answer_goes_on(bytes_url: str) -> None:
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I am"}]
    going_on = chat(bytes_url, messages=history, continue_final_message=True, add_generation_prompt=False)
    assert (
        post(bytes_url, messages=history).json()["content"][0]["text"] == going_on["choices"][0]["message"]["content"]
    )


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"system": "Be brief."},
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": {"type": "none"}},
        {"messages": [HI, {"role": "assistant", "content": "I am"}]},
    ],
)
def test_tokens_are_counted_as_the_message_reads_them(bytes_url: str, more: dict[str, Any]) -> None:
    body = {key: value for key, value in ASK.items() if key in ("model", "messages")} | more
    counted = httpx.post(f"{bytes_url}/v1/messages/count_tokens", json=body).json()
    usage = post(bytes_url, **more).json()["usage"]
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


def test_an_output_format_is_a_grammar(bytes_url: str) -> None:
    schema = TOOL["input_schema"]
    config = {"effort": "low", "format": {"type": "json_schema", "schema": schema}}
    message = post(bytes_url, output_config=config, max_tokens=80).json()
    assert json.loads(message["content"][0]["text"])["city"] in ("Rome", "Oslo")
    assert message["rapid"]["ignored"] == ["output_config.effort"]


@pytest.mark.parametrize(
    ("more", "status", "kind", "words"),
    [
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
        ({"model": "other"}, 404, "not_found_error", "not served here"),
        ({"messages": [IMAGE]}, 400, "invalid_request_error", "must be one of"),
        ({"messages": [LONG]}, 400, "invalid_request_error", "maximum context length"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, 400, "invalid_request_error", "thinking"),
        ({"temperature": 11}, 400, "invalid_request_error", "temperature"),
        ({"tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "name"),
        ({"stop_sequences": [""]}, 400, "invalid_request_error", "stop_sequences: must be"),
        ({"tools": [TOOL], "output_config": {"format": {"type": "json_schema", "schema": {}}}},
         400, "invalid_request_error", "output_config.format: cannot be had"),
    ],
)  # fmt: skip
def test_errors_have_anthropic_s_form(bytes_url: str, more: dict[str, Any], status: int, kind: str, words: str) -> None:
    answer = post(bytes_url, **more)
    assert (answer.status_code, answer.json()["type"], answer.json()["error"]["type"]) == (status, "error", kind)
    assert words in answer.json()["error"]["message"]
