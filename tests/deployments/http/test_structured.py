"""`response_format` and tools over HTTP, by OpenAI's client: valid JSON and whole calls, with drafts as without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema
import pytest
from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel
from transformers import AutoTokenizer

from deployments.schemas.tools import _HERMES, _LLAMA, CallReader, Function, Tool, call_grammar
from rapid.sampling.grammar import Grammar

STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "autoregressive"},
    {"strategy": "lookup", "num_draft_tokens": 4},
    {"strategy": "triforce", "num_draft_tokens": 4, "draft_cache_tokens": 32},
    {"strategy": "rapid", "num_draft_tokens": 3},
]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
ASK: list[Any] = [{"role": "user", "content": "abc cba " * 30 + '\n\nWhat of {"city": "Rome", "days": 3}?'}]


def chat(url: str, rapid: dict[str, Any], **options: Any) -> Any:
    options = {"model": "bytes", "messages": ASK, "max_tokens": 200, "temperature": 1, "seed": 3, **options}
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    return client.chat.completions.create(**options, extra_body={"rapid": rapid})


@pytest.mark.parametrize("rapid", STRATEGIES, ids=str)
@pytest.mark.parametrize("temperature", [0, 1])
def test_json_by_a_schema(bytes_url: str, rapid: dict[str, Any], temperature: float) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
    answer = chat(bytes_url, rapid, response_format=form, temperature=temperature, n=2)
    for choice in answer.choices:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
        assert choice.finish_reason == "stop"
        assert choice.model_extra["rapid"]["drafted"] > 0 or rapid["strategy"] != "rapid"


def test_any_json_object(bytes_url: str) -> None:
    answer = chat(bytes_url, {}, response_format={"type": "json_object"}, logit_bias={"92": 20})
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_json_that_max_tokens_cuts_says_so(bytes_url: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}}
    answer = chat(bytes_url, {}, response_format=form, max_tokens=3)
    assert answer.choices[0].message.content.startswith("{")
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("rapid", STRATEGIES, ids=str)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_call_that_must_come(bytes_url: str, rapid: dict[str, Any], stream: bool, choice: Any) -> None:
    answer = chat(bytes_url, rapid, tools=TOOLS, tool_choice=choice, stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        assert not any(chunk.delta.content for chunk in chunks)
        calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
        assert [call.index for call in calls] == [0]
        reason = chunks[-1].finish_reason
    else:
        message, reason = answer.choices[0].message, answer.choices[0].finish_reason
        assert message.content is None
        calls = message.tool_calls
    (call,) = calls
    assert reason == "tool_calls" and call.id and call.type == "function"
    parameters = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}
    jsonschema.validate(json.loads(call.function.arguments), parameters[call.function.name])
    assert choice == "required" or call.function.name == "weather"


def test_tools_and_calls_reach_the_template(bytes_url: str) -> None:
    called = {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "utc"}'}}
    messages = [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    body = {"messages": messages, "tools": TOOLS[1:]}
    tokens = httpx.post(f"{bytes_url}/tokenize", json=body).json()["tokens"]
    text = httpx.post(f"{bytes_url}/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert '<tools>{"type": "function", "function": {"name": "now"' in text
    assert '<tool_call>\n{"name": "now", "arguments": {"zone": "utc"}}\n</tool_call>' in text
    assert text.endswith("[tool]noon[assistant]")
    with_none = chat(bytes_url, {}, tools=TOOLS, tool_choice="none", max_tokens=1).usage.prompt_tokens
    assert with_none == chat(bytes_url, {}, max_tokens=1).usage.prompt_tokens
    assert with_none < chat(bytes_url, {}, tools=TOOLS, max_tokens=1).usage.prompt_tokens


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "other"}}}),
        ("tools", {"tool_choice": "required", "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"type": "array", "uniqueItems": True}}}]}),
        ("tools", {"tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/no"}, "strict": True}}]}),
        ("name", {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
        ("response_format", {"response_format": {"type": "json_object"}}),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_had_is_refused_by_name(bytes_url: str, param: str, options: dict[str, Any]) -> None:
    body = {"model": "bytes", "messages": ASK, "tools": TOOLS, **options}
    answer = httpx.post(f"{bytes_url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert param in answer.json()["error"]["message"]


HERMES = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 1}}\n</tool_call>'
LLAMA = '{"name": "weather", "parameters": {"city": "Rome", "days": 1}}'


@pytest.mark.parametrize(
    ("written", "content", "names"),
    [
        (HERMES, "Let me see.\n", ["weather"]),
        (HERMES + "\n" + HERMES.partition("\n")[2].replace("weather", "now"), "Let me see.\n", ["weather", "now"]),
        (LLAMA, "", ["weather"]),
        (LLAMA + "; " + LLAMA.replace("weather", "now"), "", ["weather", "now"]),
        (LLAMA + "\n" + LLAMA.replace("weather", "now"), "", ["weather", "now"]),
        (LLAMA + "; and more", "; and more", ["weather"]),
        ("a < b <tool", "a < b <tool", []),
        ('{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', []),
        ('{"name": ["weather"], "parameters": {}}', '{"name": ["weather"], "parameters": {}}', []),
        ('{"name": ' + "[" * 5000, '{"name": ' + "[" * 5000, []),
        ("{ is a brace", "{ is a brace", []),
        ("<tool_call>\n{broken}\n</tool_call>", "<tool_call>\n{broken}\n</tool_call>", []),
        ('<tool_call>\n{"name": "weather"', '<tool_call>\n{"name": "weather"', []),
        ("  two spaces", "  two spaces", []),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_told_from_text_however_it_comes(written: str, content: str, names: list[str], size: int) -> None:
    tools = [Tool(type="function", function=Function(name=name)) for name in ("weather", "now")]
    reader = CallReader(tools, _HERMES if "<tool" in written else _LLAMA)
    shown = "".join(reader.push(written[i : i + size]) for i in range(0, len(written), size))
    rest, calls = reader.finish()
    assert (shown + rest, [call["function"]["name"] for call in calls]) == (content, names)
    if names:
        assert json.loads(calls[0]["function"]["arguments"]) == {"city": "Rome", "days": 1}


def test_text_that_only_begins_like_a_call_is_not_withheld() -> None:
    tools = [Tool(type="function", function=Function(name="now"))]
    for form, text in ((_HERMES, '{"name": "now"'), (_LLAMA, '{ "city"'), (_LLAMA, "Let me see"), (_HERMES, "a <b")):
        assert CallReader(tools, form).push(text) == text
    assert CallReader(tools, _LLAMA).push(' {\n "na') == CallReader(tools, _HERMES).push("<tool_") == ""


def strict(*names: str) -> list[Tool]:
    """The tools above, of which these are strict."""
    return [
        Tool.model_validate(t | {"function": t["function"] | {"strict": t["function"]["name"] in names}}) for t in TOOLS
    ]


AGAIN = HERMES.partition("\n")[2]
FALSE = '"days": 10'


@pytest.mark.parametrize(
    ("form", "several", "text", "good"),
    [
        (_HERMES, True, "No <b> call.", True),
        (_HERMES, True, HERMES + "\n" + AGAIN + " So.", True),
        (_HERMES, False, HERMES + " So.", True),
        (_HERMES, False, HERMES + "\n" + AGAIN, False),
        (_HERMES, True, HERMES.replace('"days": 1', FALSE), False),
        (_HERMES, True, HERMES.replace("weather", "now"), True),
        (_HERMES, True, HERMES.replace("weather", "other"), False),
        (_LLAMA, True, 'No {"name" call.', True),
        (_LLAMA, True, '{"nature": 1}', True),
        (_LLAMA, True, LLAMA + "; " + LLAMA, True),
        (_LLAMA, False, LLAMA + "; " + LLAMA, False),
        (_LLAMA, True, LLAMA.replace('"days": 1', FALSE), False),
        (_LLAMA, True, ' {"name": 1}', False),
    ],
)
def test_a_strict_tool_is_called_by_its_schema_or_not_at_all(
    bytes_folder: Path, form: Any, several: bool, text: str, good: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bytes_folder)
    grammar = call_grammar(strict("weather"), "auto", form, several=several)
    assert grammar
    tokens, end = tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id
    held = Grammar(grammar, tokenizer, len(tokenizer), [end])
    assert (held.num_allowed([], [*tokens, end]) == len(tokens) + 1) is good


def test_only_strictness_or_a_single_call_takes_a_grammar() -> None:
    assert call_grammar(strict(), "auto", _HERMES, several=True) is None
    assert call_grammar(strict(), "auto", _HERMES, several=False)


@pytest.mark.parametrize("rapid", STRATEGIES, ids=str)
def test_text_that_calls_nothing_is_the_same_by_a_grammar(bytes_url: str, rapid: dict[str, Any]) -> None:
    readable = {str(token): 50 for token in range(94)}  # other bytes may make no text
    options = {"tools": TOOLS, "temperature": 0, "max_tokens": 40, "logit_bias": readable}
    free, held = (chat(bytes_url, rapid, **options, parallel_tool_calls=several) for several in (True, False))
    assert free.choices[0].message.content == held.choices[0].message.content
    assert held.model_extra["rapid"]["drafted"] > 0 or rapid["strategy"] != "rapid"


def test_a_tool_of_the_client_s_own_making_is_taken(bytes_url: str) -> None:
    class Weather(BaseModel):
        city: Literal["Rome", "Oslo"]

    tool = pydantic_function_tool(Weather)
    assert tool["function"]["strict"]
    assert chat(bytes_url, {}, tools=[tool], max_tokens=2).choices
    (call,) = chat(bytes_url, {}, tools=[tool], tool_choice="required").choices[0].message.tool_calls
    Weather.model_validate_json(call.function.arguments)
