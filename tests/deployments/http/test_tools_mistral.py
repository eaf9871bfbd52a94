"""Mistral's calls: special tokens around a list of them, or a name and the arguments; their text is shown to nobody."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import local_api
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deployments.schemas.reasoning import ReasoningFormat, reasoning_format
from deployments.schemas.tools import CallFormat, CallReader, Tool, call_format
from rapid.sampling.grammar import Grammar, after_reasoning, regex_grammar
from rapid.text.tokenizer import Detokenizer

LIST = """{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}{% for message in messages -%}
{% if message.tool_calls %}[TOOL_CALLS][{% for call in message.tool_calls -%}
{% if call.id | length != 9 %}{{ raise_exception("nine letters") }}{% endif %}{{ call.function | tojson }}
{%- endfor %}]{% else %}[INST]{{ message.content }}[/INST]{% endif %}{% endfor %}"""
NAMED = LIST.replace("[TOOL_CALLS][", "[TOOL_CALLS]{{ message.tool_calls[0].function.name }}[ARGS]")
MARKS = ["[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"]
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
        "additionalProperties": False}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A byte a token, and Mistral's special tokens."""
    vocabulary = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    fast = Tokenizer(BPE(vocabulary, []))
    fast.pre_tokenizer, fast.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>", chat_template=template)
    made.add_tokens(MARKS, special_tokens=True)
    return made


@pytest.fixture(scope="module", params=[LIST, NAMED], ids=["list", "named"])
def mistral_url(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_network: Callable[..., PreTrainedModel],
) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("mistral")
    tokenizer(request.param).save_pretrained(folder)
    tiny_network(261, layers=1, window=8192, eos=256).save_pretrained(folder)
    engine = {"model": str(folder), "dtype": "float32", "kv_memory_gib": 0.1, "threads": 1}
    with local_api({"served_model": "mistral", "target": engine, "drafter": engine}) as url:
        yield url


def ask(url: str, *history: dict[str, Any], **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "How is it in Oslo?"}, *history]
    body = {"model": "mistral", "messages": messages, "max_tokens": 80, "temperature": 0, "tools": [TOOL], **more}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    if not more.get("stream"):
        return dict(answer.json()["choices"][0])
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    return {"deltas": [choice["delta"] for chunk in chunks for choice in chunk["choices"]]}


@pytest.mark.parametrize("strategy", ["autoregressive", "lookup", "rapid"])
def test_a_forced_call(mistral_url: str, strategy: str) -> None:
    rapid = {"strategy": strategy, "num_draft_tokens": 3}
    choice = ask(mistral_url, tool_choice="required", rapid=rapid)
    [call] = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert call["function"]["name"] == "weather" and len(call["id"]) == 9
    assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")
    plain = ask(mistral_url, tool_choice="required", rapid={"strategy": "autoregressive"})["message"]["tool_calls"]
    assert call["function"] == plain[0]["function"]
    deltas = ask(mistral_url, tool_choice="required", stream=True, rapid=rapid)["deltas"]
    assert "".join(delta.get("content", "") for delta in deltas) == ""
    assert [c["function"] for delta in deltas for c in delta.get("tool_calls", [])] == [call["function"]]


def test_calls_of_other_servers_come_back_with_names_that_the_template_takes(mistral_url: str) -> None:
    called = {"id": "call_of_another_server", "type": "function",
              "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}  # fmt: skip
    result = {"role": "tool", "tool_call_id": "call_of_another_server", "content": "snow"}
    ask(mistral_url, {"role": "assistant", "content": "", "tool_calls": [called]}, result, max_tokens=2)


NAMES = [Tool.model_validate({"type": "function", "function": {"name": name}}) for name in "fg"]


@pytest.mark.parametrize(
    ("written", "text", "called"),
    [
        ('[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]', "", ["f", "g"]),
        ('Well. [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', "Well. ", ["f"]),
        ('[TOOL_CALLS]f[ARGS]{"a": "[x]"}[TOOL_CALLS]g[ARGS]{}', "", ["f", "g"]),
        ('[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{"a": 1}', "", ["f"]),
        ('[TOOL_CALLS]f{"a": 1}', "", ["f"]),
        ('[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "x", "arguments": {}}]',
         '{"name": "x", "arguments": {}}', ["f"]),
        ('[TOOL_CALLS]f[ARGS]{"a"', '[TOOL_CALLS]f[ARGS]{"a"', []),
        ("[TOOL_CAL is text", "[TOOL_CAL is text", []),
    ],
)  # fmt: skip
def test_calls_are_read_wherever_the_text_is_cut(written: str, text: str, called: list[str]) -> None:
    form = call_format(tokenizer(NAMED))
    for seed in range(10):
        reader, chance, shown, rest = CallReader(NAMES, form), random.Random(seed), "", written
        while rest:
            size = chance.choice((1, 2, 5, 20))
            shown, rest = shown + reader.push(rest[:size]), rest[size:]
        rest, calls = reader.finish()
        assert ([call["function"]["name"] for call in calls], shown + rest) == (called, text)


def test_special_tokens_are_shown_where_they_mark_something() -> None:
    made = tokenizer(LIST)
    tokens = [made.convert_tokens_to_ids("[TOOL_CALLS]"), *made.encode("é["), made.convert_tokens_to_ids("[ARGS]"), 70]
    plain, marked = Detokenizer(made), Detokenizer(made, shown=frozenset(tokens[:1]))
    assert "".join(map(plain.push, tokens)) + plain.finish() == "é[" + made.decode([70])
    assert "".join(map(marked.push, tokens)) + marked.finish() == "[TOOL_CALLS]é[" + made.decode([70])
    assert isinstance(call_format(made), CallFormat) and call_format(made).marks["[ARGS]"] == tokens[-2]


def test_a_grammar_behind_reasoning_that_special_tokens_mark() -> None:
    made = tokenizer(LIST)
    form = reasoning_format(made, [70])
    assert form is not None and form._replace(marks={}) == ReasoningFormat("[THINK]", "[/THINK]")
    own = regex_grammar("[0-9]+", "response_format")
    grammar = after_reasoning(own, form.opening, form.closing, is_open=False, marks=form.marks)

    def allowed(text: str) -> int:
        return Grammar(grammar, made, len(made), [256]).num_allowed([], made.encode(text))

    assert allowed("[THINK]hm 7[/THINK]\n42") == len("hm 7\n42") + 2
    assert allowed("42") == 2 and allowed("hm") == 0
    assert allowed("[THINK]hm[/THINK]no") == len("hm") + 2
