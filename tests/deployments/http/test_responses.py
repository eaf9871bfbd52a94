"""OpenAI's Responses API: the same answers as the chats', in its form, and conversations that go on."""

from __future__ import annotations

import asyncio
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import NotFoundError, OpenAI

from deployments.files.responses import ResponseNotStored, StoredResponses
from deployments.schemas.responses import ResponsesRequest
from rapid.errors import InvalidRequest

ASK: dict[str, Any] = {"model": "bytes", "input": "Hi", "max_output_tokens": 12, "temperature": 0}


@cache  # nobody closes it, and the collector might take its socket before its client
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def chat(url: str, *messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    body = {"model": "bytes", "messages": messages, "max_tokens": 12, "temperature": 0, **more}
    return dict(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json())


def content(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


HI = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize("strategy", ["autoregressive", "lookup", "rapid"])
def test_a_response_is_the_chat_s_answer(bytes_url: str, strategy: str) -> None:
    rapid = {"strategy": strategy}
    response = client(bytes_url).responses.create(**ASK, instructions="Be brief.", extra_body={"rapid": rapid})
    expected = chat(bytes_url, {"role": "system", "content": "Be brief."}, HI, rapid=rapid)
    assert response.output_text == content(expected)
    assert response.usage.input_tokens == expected["usage"]["prompt_tokens"]
    assert response.usage.output_tokens == expected["usage"]["completion_tokens"]
    assert response.status == {"length": "incomplete", "stop": "completed"}[expected["choices"][0]["finish_reason"]]
    assert response.model_extra["rapid"]["strategy"] == strategy


def test_a_stream_tells_the_same(bytes_url: str) -> None:
    whole = client(bytes_url).responses.create(**ASK)
    events = list(client(bytes_url).responses.create(**ASK, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:-1] == ["output_text.done", "content_part.done", "output_item.done"]
    assert kinds[-1] == whole.status
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text


def test_a_conversation_goes_on(bytes_url: str) -> None:
    first = client(bytes_url).responses.create(**ASK, instructions="Be brief.")
    second = client(bytes_url).responses.create(**{**ASK, "input": "And?"}, previous_response_id=first.id)
    said = {"role": "assistant", "content": first.output_text}
    third = {"role": "user", "content": "So?"}
    and_ = {"role": "user", "content": "And?"}
    assert second.output_text == content(chat(bytes_url, HI, said, and_))  # without the earlier instructions
    last = client(bytes_url).responses.create(**{**ASK, "input": [third]}, previous_response_id=second.id, stream=True)
    *_, end = last
    answered = {"role": "assistant", "content": second.output_text}
    assert end.response.output_text == content(chat(bytes_url, HI, said, and_, answered, third))


def test_input_tokens_are_those_that_a_response_reads(bytes_url: str) -> None:
    first = client(bytes_url).responses.create(**ASK, instructions="Be brief.")
    for more in ({"instructions": "Be brief."}, {"previous_response_id": first.id}, {"tools": [TOOL]}):
        counted = httpx.post(f"{bytes_url}/v1/responses/input_tokens", json={**ASK, **more}).json()
        read = client(bytes_url).responses.create(**ASK, **more).usage
        assert read and counted == {"object": "response.input_tokens", "input_tokens": read.input_tokens}
    other = httpx.post(f"{bytes_url}/v1/responses/input_tokens", json={**ASK, "model": "other"}).json()["error"]
    assert other["param"] == "model"


def test_it_is_kept_and_deleted(bytes_url: str) -> None:
    api = client(bytes_url).responses
    made = api.create(**ASK)
    assert api.retrieve(made.id).output_text == made.output_text
    (item,) = api.input_items.list(made.id).data
    assert item.content[0].text == "Hi"  # type: ignore[union-attr]
    assert httpx.post(f"{bytes_url}/v1/responses/{made.id}/cancel").status_code == 400
    api.delete(made.id)
    for ask in (lambda: api.retrieve(made.id), lambda: api.create(**ASK, previous_response_id=made.id)):
        with pytest.raises(NotFoundError):
            ask()
    absent = httpx.get(f"{bytes_url}/v1/responses/{made.id}/input_items").json()["error"]
    assert absent["param"] == "response_id"
    with pytest.raises(NotFoundError):
        api.retrieve(api.create(**ASK, store=False).id)


CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
        "additionalProperties": False}  # fmt: skip
TOOL: Any = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_is_called_and_answered(bytes_url: str, stream: bool) -> None:
    api = client(bytes_url).responses
    ask = {**ASK, "max_output_tokens": 80, "tools": [TOOL]}
    if stream:
        events = list(api.create(**ask, tool_choice="required", stream=True))
        done = next(event for event in events if event.type == "response.function_call_arguments.done")
        made = events[-1].response
        assert done.arguments == made.output[0].arguments
    else:
        made = api.create(**ask, tool_choice="required")
    (call,) = made.output
    assert (call.type, call.name) == ("function_call", "weather")
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "snow"}
    after = api.create(**{**ask, "input": [result]}, previous_response_id=made.id, tool_choice="none")
    function = {"id": call.call_id, "type": "function", "function": {"name": "weather", "arguments": call.arguments}}
    history = [HI, {"role": "assistant", "content": "", "tool_calls": [function]},
               {"role": "tool", "tool_call_id": call.call_id, "content": "snow"}]  # fmt: skip
    assert after.output_text == content(chat(bytes_url, *history, max_tokens=80))


def test_text_in_a_form(bytes_url: str) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}}
    response = client(bytes_url).responses.create(**{**ASK, "max_output_tokens": 60}, text=form)
    assert json.loads(response.output_text)["city"] in ("Rome", "Oslo")


def test_calls_beside_one_another_are_one_message() -> None:
    def call(name: str) -> dict[str, Any]:
        return {"type": "function_call", "id": "x", "call_id": name, "name": name, "arguments": "{}"}

    items = [HI, {"type": "reasoning", "id": "r", "summary": []}, {"role": "assistant", "content": "Look."},
             call("a"), call("b"), {"type": "function_call_output", "call_id": "a", "output": "1"}]  # fmt: skip
    body = ResponsesRequest.model_validate({**ASK, "input": items})
    _, said, result = body.messages()
    assert [call.id for call in said.calls] == ["a", "b"] and (said.content, result.role) == ("Look.", "tool")
    assert body.ignored == ["input.id", "input.summary"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"input": [{"type": "computer_call"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"conversation": "c"}, "conversation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"previous_response_id": "../../etc"}, "previous_response_id"),
        ({"tools": [TOOL], "text": {"format": {"type": "json_object"}}}, "text.format"),
    ],
)
def test_what_is_not_there_is_refused_by_name(bytes_url: str, more: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{bytes_url}/v1/responses", json={**ASK, **more})
    assert answer.status_code in (400, 404) and answer.json()["error"]["param"].startswith(param)


def test_only_the_newest_are_kept_and_not_for_ever(tmp_path: Path) -> None:
    names = [f"resp_{i:032x}" for i in range(4)]
    stored = StoredResponses(tmp_path, keep_hours=1, max_bytes=100)

    async def known(tenant: str) -> list[str]:
        found = []
        for name in names:
            try:
                await stored.get(tenant, name)
            except ResponseNotStored:
                continue
            found.append(name)
        return found

    def set_age(name: str, seconds: float) -> None:
        path = tmp_path / "tenants" / "a" / "responses" / f"{name}.json"
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))

    async def check() -> None:
        for i, name in enumerate(names[:3]):
            await stored.put("a", name, {"text": "x" * 30})
            set_age(name, 100 - i)
        assert await known("a") == names[1:3]  # each has some 40 bytes
        assert await known("b") == []
        set_age(names[1], 3600)
        assert await known("a") == names[2:3]
        with pytest.raises(InvalidRequest):
            await stored.put("a", names[3], {"text": "x" * 100})

    asyncio.run(check())
