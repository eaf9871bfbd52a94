"""Tools for models without a place for them, the older form of calls, and forms that vLLM's users ask for."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from served import MODEL

from deployments.schemas.told_tools import with_tools_told
from rapid.text.prompts import Message
from rapid.text.tokenizer import load_tokenizer

CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
        "additionalProperties": False}  # fmt: skip
WEATHER = {"name": "weather", "description": "how it is outside", "parameters": CITY}
TOOL = {"type": "function", "function": WEATHER}
ASKED = {"role": "user", "content": "How is the weather in Oslo?"}


def chat(url: str, *messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": messages or [ASKED], "max_tokens": 60, "temperature": 0, **more}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.mark.parametrize(
    "rapid", [{"strategy": "autoregressive"}, {"strategy": "rapid", "num_draft_tokens": 4}], ids=str
)
def test_a_model_whose_template_has_no_tools_calls_them(smollm_url: str, rapid: dict[str, Any]) -> None:
    choice = chat(smollm_url, tools=[TOOL], tool_choice="required", rapid=rapid)["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], call["function"]["name"]) == ("tool_calls", "weather")
    assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")


def test_its_results_come_back_as_text(smollm_url: str) -> None:
    called = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    result = {"role": "tool", "tool_call_id": "1", "content": "snow"}
    answer = chat(smollm_url, ASKED, {"role": "assistant", "tool_calls": [called]}, result, tools=[TOOL])
    assert answer["choices"][0]["message"]["content"] is not None


def test_what_the_model_is_told() -> None:
    called = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    messages = [
        Message("system", "Be brief.", documents=((3, 8),)),
        Message("user", "How is it?"),
        Message("assistant", "", {"tool_calls": [called]}),
        Message("tool", "snow", {"tool_call_id": "1"}),
        Message("tool", "wind", {"tool_call_id": "2"}),
    ]
    told = with_tools_told(messages, [TOOL], load_tokenizer(MODEL))
    assert [message.role for message in told] == ["system", "user", "assistant", "user"]
    ((start, end),) = told[0].documents
    assert told[0].content[start:end] == "brief" and json.dumps(WEATHER) in told[0].content
    assert told[2].content == '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert re.findall("<tool_response>\n(.*)\n</tool_response>", told[3].content) == ["snow", "wind"]


def test_the_older_form_of_calls(smollm_url: str) -> None:
    choice = chat(smollm_url, functions=[WEATHER], function_call={"name": "weather"})["choices"][0]
    call = choice["message"]["function_call"]
    assert (choice["finish_reason"], call["name"], "tool_calls" in choice["message"]) == (
        "function_call",
        "weather",
        False,
    )
    history = [ASKED, {"role": "assistant", "content": None, "function_call": call},
               {"role": "function", "name": "weather", "content": "snow"}]  # fmt: skip
    assert "function_call" not in chat(smollm_url, *history, functions=[WEATHER], function_call="none")["choices"][0]


def test_an_answer_goes_on_with_the_last_message(smollm_url: str) -> None:
    begun = "The capital of France is"
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": begun}]
    going_on = chat(smollm_url, *history, continue_final_message=True, add_generation_prompt=False, max_tokens=8)
    tokenizer = load_tokenizer(MODEL)
    prompt = str(tokenizer.apply_chat_template(history, tokenize=False, continue_final_message=True))
    assert prompt.endswith(begun)
    tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    body = {"model": MODEL, "prompt": tokens, "max_tokens": 8, "temperature": 0}
    expected = httpx.post(f"{smollm_url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    assert going_on["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"structured_outputs": {"choice": ["yes it is", "no"]}}, "yes it is|no"),
        ({"guided_choice": ["red", "blue"]}, "red|blue"),
        ({"structured_outputs": {"regex": "[0-9]{3}/[a-c]"}}, "[0-9]{3}/[a-c]"),
        ({"guided_regex": r"a\/b|c\\d"}, r"a/b|c\\d"),
        ({"structured_outputs": {"json": CITY}}, r'\{"city": "(Rome|Oslo)"\}'),
        ({"guided_json": json.dumps(CITY)}, r'\{"city": "(Rome|Oslo)"\}'),
        ({"structured_outputs": {"grammar": 'start: "x" | "y" "z"'}}, "x|yz"),
    ],
    ids=str,
)
@pytest.mark.parametrize("strategy", ["autoregressive", "rapid"])
def test_forms_of_vllm(smollm_url: str, strategy: str, form: dict[str, Any], pattern: str) -> None:
    written = chat(smollm_url, **form, rapid={"strategy": strategy})["choices"][0]["message"]["content"]
    assert re.fullmatch(pattern, written)


def test_the_last_tokens_of_a_prompt(smollm_url: str) -> None:
    whole = chat(smollm_url, {"role": "user", "content": "word " * 300 + "Say A."}, max_tokens=1)
    cut = chat(
        smollm_url, {"role": "user", "content": "word " * 300 + "Say A."}, max_tokens=1, truncate_prompt_tokens=50
    )
    assert whole["usage"]["prompt_tokens"] > 300 and cut["usage"]["prompt_tokens"] == 50
    long = {"role": "user", "content": "word " * 9000}  # longer than the window
    assert chat(smollm_url, long, max_tokens=1, truncate_prompt_tokens=20)["usage"]["prompt_tokens"] == 20


@pytest.mark.parametrize(
    ("field", "value"), [("guided_choice", []), ("guided_json", "{"), ("guided_json", "[]"), ("guided_regex", "(")]
)
def test_a_wrong_form_is_refused_by_name(bytes_url: str, field: str, value: Any) -> None:
    body = {"model": "bytes", "messages": [ASKED], "max_tokens": 2, field: value}
    assert httpx.post(f"{bytes_url}/v1/chat/completions", json=body, timeout=60).status_code == 400
