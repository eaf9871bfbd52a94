"""Reasoning is apart from the answer: whole, streamed, with calls, in every API, wherever a round's tokens end."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import local_api
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deployments.config import parse_config
from deployments.http.api import make_api
from deployments.schemas.events import Events, Started
from deployments.schemas.reasoning import ReasoningFormat, ReasoningReader, ThinkingOption, reasoning_format
from deployments.schemas.tools import CallFormat
from rapid.errors import InvalidRequest
from rapid.events import Delta, Finish, Statistics
from rapid.sampling.grammar import Grammar, after_reasoning, regex_grammar

THINK = ReasoningFormat("<think>", "</think>")
OPEN = THINK._replace(is_open=True)
HERMES = CallFormat("<tool_call>\n", "arguments", "\n</tool_call>", "<tool_call>")
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def pieces_of(text: str, seed: int) -> list[str]:
    """``text`` cut at random."""
    chance, pieces = random.Random(seed), []
    while text:
        size = chance.choice((1, 2, 3, 8, 30))
        pieces.append(text[:size])
        text = text[size:]
    return pieces


CASES = [
    (THINK, "<think>\nIt is 2 < 3.\n</think>\n\nYes.", "It is 2 < 3.", "Yes."),
    (THINK, "\n<think>a</think>b</think>c", "a", "b</think>c"),
    (THINK, "<think>\n\n</think>\n\nYes.", "", "Yes."),
    (THINK, "<think>cut sh", "cut sh", ""),
    (THINK, "<think>cut </thi", "cut </thi", ""),
    (THINK, "  no <think>thought</think>", "", "  no <think>thought</think>"),
    (THINK, "<thin", "", "<thin"),
    (THINK, " ", "", " "),
    (OPEN, "\nhm\n\nhm </ hm\n</think>\n\nYes. \n", "hm\n\nhm </ hm", "Yes. \n"),
    (OPEN, "hm", "hm", ""),
    (OPEN, "</think>Yes.", "", "Yes."),
    (OPEN, "hm</think>  ", "hm", ""),
]


@pytest.mark.parametrize(("form", "text", "reasoning", "answer"), CASES)
def test_reasoning_is_found_wherever_the_text_is_cut(
    form: ReasoningFormat, text: str, reasoning: str, answer: str
) -> None:
    for seed in range(30):
        reader = ReasoningReader(form)
        parts = [*map(reader.push, pieces_of(text, seed)), reader.finish()]
        assert ("".join(part[0] for part in parts), "".join(part[1] for part in parts)) == (reasoning, answer)


def test_a_family_is_told_by_its_template_and_the_prompt(
    letter_tokenizer: Callable[[int], PreTrainedTokenizerFast], chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert reasoning_format(chat_tokenizer, chat_tokenizer.encode("<think>\n")) is None
    thinks = letter_tokenizer(29)
    thinks.chat_template = "{{ messages[0].content.split('</think>')[-1] }}"
    assert reasoning_format(thinks, [1, 2, 3]) == THINK
    thinks.add_tokens(["<think>"])
    assert reasoning_format(thinks, [1, 2, 3, len(thinks) - 1, 0]) == OPEN
    assert reasoning_format(thinks, [len(thinks) - 1, 0, 5]) == THINK
    by_tokens = letter_tokenizer(29)
    by_tokens.add_tokens(["[THINK]", "[/THINK]"])
    assert reasoning_format(by_tokens, [1]) == ReasoningFormat("[THINK]", "[/THINK]")


def test_reasoning_is_switched_where_the_template_can_and_refused_by_name_elsewhere(
    letter_tokenizer: Callable[[int], PreTrainedTokenizerFast],
) -> None:
    def kwargs(template: str, kind: str) -> dict[str, Any] | str | None:
        tokenizer = letter_tokenizer(29)
        tokenizer.chat_template = template
        try:
            return ThinkingOption.model_validate({"type": kind, "budget_tokens": 99}).template_kwargs(tokenizer)
        except InvalidRequest as error:
            return error.param

    switched = "{% if enable_thinking %}<think>{% endif %}"
    assert kwargs(switched, "enabled") == {"enable_thinking": True}
    assert kwargs(switched, "disabled") == {"enable_thinking": False}
    assert [kwargs("</think>", kind) for kind in ("enabled", "disabled")] == [{}, "thinking"]
    assert [kwargs("plain", kind) for kind in ("enabled", "disabled")] == ["thinking", {}]


class Written:
    """A service that writes ``text`` in rounds that end anywhere."""

    files = None

    def __init__(self, text: str, form: ReasoningFormat, seed: int) -> None:
        self._text, self._form, self._seed = text, form, seed

    async def generate(self, completion: Any, tenant: str) -> Events:
        yield Started(7, calls=HERMES if completion.tools_in_use else None, reasoning=self._form)
        pieces = pieces_of(self._text, self._seed)
        for first in range(0, len(pieces), 3):
            some = pieces[first : first + 3]
            yield Delta([1] * len(some), some, 2, len(some) - 1, "model", 1.0, 0.0, 1.0, [])
        yield Finish("", "stop", Statistics("rapid", prompt_tokens=7, emitted=len(pieces)))


def ask(text: str, path: str, body: dict[str, Any], form: ReasoningFormat = THINK, seed: int = 0) -> httpx.Response:
    async def send() -> httpx.Response:
        app = make_api(parse_config({}), Written(text, form, seed))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.post(path, json={"model": "smollm2-135m-instruct", **body})

    answer = asyncio.run(send())
    assert answer.status_code == 200, answer.text
    return answer


def told(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


CHAT = {"messages": [{"role": "user", "content": "2 < 3?"}]}
TEXTS = ["<think>\nIt is.\n</think>\n\nYes.", "<think>\nI add.\n</think>\n\n" + CALL, "Yes.", CALL]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("seed", range(5))
def test_chats_have_reasoning_content_whole_and_streamed(text: str, seed: int) -> None:
    body = {**CHAT, "tools": TOOLS}
    whole = ask(text, "/v1/chat/completions", body, seed=seed).json()
    message = whole["choices"][0]["message"]
    reasons, _, rest = text.removeprefix("<think>\n").rpartition("\n</think>\n\n")
    assert message.get("reasoning_content", "") == reasons
    assert (message["content"] or "") == ("" if rest == CALL else rest)
    assert bool(message.get("tool_calls")) == (rest == CALL)
    counted = whole["usage"].get("completion_tokens_details", {"reasoning_tokens": 0})["reasoning_tokens"]
    assert bool(reasons) == bool(counted) and counted <= whole["usage"]["completion_tokens"]
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    chunks = told(ask(text, "/v1/chat/completions", streamed, seed=seed))
    assert chunks[-1]["usage"] == whole["usage"]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == reasons
    assert "".join(delta.get("content", "") for delta in deltas) == (message["content"] or "")
    assert [call["function"] for d in deltas for call in d.get("tool_calls", [])] == [
        call["function"] for call in message.get("tool_calls", [])
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_messages_have_a_thinking_block(text: str) -> None:
    tools = [{"name": "add", "input_schema": {"type": "object"}}]
    body = {**CHAT, "max_tokens": 99, "tools": tools}
    blocks = ask(text, "/v1/messages", body).json()["content"]
    kinds = ["thinking"] * ("<think>" in text) + ["tool_use" if CALL in text else "text"]
    assert [block["type"] for block in blocks] == kinds
    assert "<think>" not in json.dumps(blocks) and (kinds[0] != "thinking" or blocks[0]["signature"] == "")
    shown: list[dict[str, Any]] = []
    for event in told(ask(text, "/v1/messages", {**body, "stream": True})):
        if event["type"] == "content_block_start":
            assert event["index"] == len(shown)
            shown.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            field = delta["type"].removesuffix("_delta")
            if field == "input_json":
                shown[-1]["input"] = json.loads(delta["partial_json"])
            else:
                shown[-1][field] += delta[field]
    for block in (*shown, *blocks):
        block.pop("id", None)
    assert shown == blocks


@pytest.mark.parametrize("text", TEXTS)
def test_responses_have_a_reasoning_item(text: str) -> None:
    body = {"input": "2 < 3?", "store": False, "tools": [{"type": "function", "name": "add"}]}
    response = ask(text, "/v1/responses", body).json()
    output = response["output"]
    assert [i["type"] for i in output] == ["reasoning"] * ("<think>" in text) + [
        "function_call" if CALL in text else "message"
    ]
    assert bool(response["usage"]["output_tokens_details"]["reasoning_tokens"]) == ("<think>" in text)
    events = told(ask(text, "/v1/responses", {**body, "stream": True}))
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [event["output_index"] for event in events if event["type"] == "response.output_item.done"] == list(
        range(len(done))
    )
    assert done == events[-1]["response"]["output"]
    deltas = "".join(event["delta"] for event in events if event["type"] == "response.reasoning_text.delta")
    for item in (*done, *output):
        item.pop("id"), item.pop("call_id", None)
    assert done == output
    assert deltas == (output[0]["content"][0]["text"] if "<think>" in text else "")


def test_a_grammar_holds_behind_the_reasoning_and_drafts_cross_the_border(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    own = regex_grammar("[0-9]+", "response_format")

    def allowed(text: str, *, is_open: bool) -> str:
        """What of ``text``, as one draft, the grammar lets through."""
        grammar = after_reasoning(own, "<think>", "</think>", is_open=is_open)
        state = Grammar(grammar, chat_tokenizer, len(chat_tokenizer), [2])
        tokens = chat_tokenizer.encode(text, add_special_tokens=False)
        num = state.num_allowed([], tokens)
        for first in range(num):  # the same token by token, and back again
            assert state.num_allowed(tokens[:first], tokens[first:]) == num - first
        return str(chat_tokenizer.decode(tokens[:num]))

    assert allowed("hm, {7}</think>\n\n42", is_open=True) == "hm, {7}</think>\n\n42"
    assert allowed("hm</think>\n\nforty", is_open=True).rstrip() == "hm</think>"
    assert allowed("<think>hm</think>42", is_open=False) == "<think>hm</think>42"
    assert allowed("42", is_open=False) == "42"
    assert allowed("hm</think>42", is_open=False) == ""


@pytest.fixture(scope="module")
def thinking_url(bytes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A random model whose template opens the reasoning, unless told not to; it never closes it."""
    folder = tmp_path_factory.mktemp("thinking")
    shutil.copytree(bytes_folder, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    opening = "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
    tokenizer.chat_template = "{{ messages[0].content.split('</think>')[-1] }}" + opening
    tokenizer.save_pretrained(folder)
    engine = {"model": str(folder), "dtype": "float32", "kv_memory_gib": 0.1, "threads": 1}
    with local_api({"served_model": "bytes", "target": engine, "drafter": engine}) as url:
        yield url


def test_every_strategy_reasons_alike_and_a_grammar_waits_for_the_end(thinking_url: str) -> None:
    def write(strategy: str, **more: Any) -> dict[str, Any]:
        body = {**CHAT, "model": "bytes", "max_tokens": 24, "temperature": 0, **more}
        answer = httpx.post(
            f"{thinking_url}/v1/chat/completions", json={**body, "rapid": {"strategy": strategy}}, timeout=60
        )
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    for more in ({}, {"guided_regex": "[0-9]{4}"}):
        plain = write("autoregressive", **more)
        message = plain["choices"][0]["message"]
        assert message["content"] == "" and message["reasoning_content"]
        details = plain["usage"]["completion_tokens_details"]
        assert details["reasoning_tokens"] == plain["usage"]["completion_tokens"]
        assert write("autoregressive", **more, thinking={"type": "enabled"})["choices"][0]["message"] == message
        for strategy in ("lookup", "rapid", "magicdec"):
            assert write(strategy, **more)["choices"][0]["message"] == message


def test_the_tokens_of_a_message_are_counted_with_its_reasoning_or_without(thinking_url: str) -> None:
    counts = []
    for kind in ("enabled", "disabled"):
        body = {**CHAT, "model": "bytes", "thinking": {"type": kind}}
        counted = httpx.post(f"{thinking_url}/v1/messages/count_tokens", json=body).json()["input_tokens"]
        usage = httpx.post(f"{thinking_url}/v1/messages", json={**body, "max_tokens": 1}, timeout=60).json()["usage"]
        assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]
        counts.append(counted)
    assert counts[0] - counts[1] == len("<think>\n")
