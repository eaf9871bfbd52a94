"""Documented requests of public APIs: each is answered as it asks, or refused by the name of what is not served."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import local_api

from benchmarks.documented_examples.__main__ import outcome
from benchmarks.documented_examples.examples import Example, names_of, read_table, send
from benchmarks.documented_examples.shapes import faults

MOST = 16  # tokens of an answer: the random model seldom ends earlier
WHOLE = {"model": "bytes", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "ignore_eos": True}
EXAMPLES = read_table()[1]


@pytest.fixture(scope="module")
def client(bytes_folder: Path) -> Iterator[httpx.Client]:
    engine = {"model": str(bytes_folder), "kv_memory_gib": 0.1, "threads": 1}
    config = {"served_model": "bytes", "target": engine, "drafter": engine, "default_max_tokens": MOST}
    with local_api(config) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def description(client: httpx.Client) -> dict[str, Any]:
    return dict(client.get("/openapi.json").json())


def short(example: Example) -> Example:
    body = example.body or {}
    if body.get("max_tokens", 0) > MOST:
        return replace(example, body={**body, "max_tokens": MOST})
    return example


@pytest.mark.parametrize("source", read_table()[0])
def test_every_documented_example(client: httpx.Client, description: dict[str, Any], source: str) -> None:
    names = names_of(client)
    examples = [short(example.about(names)) for example in EXAMPLES if example.source == source]
    outcomes = {example.name: outcome(client, example, description) for example in examples}
    assert len(outcomes) == len(examples) > 2
    assert {name: said["faults"] for name, said in outcomes.items() if said["faults"]} == {}
    assert all(bool(example.refused) == (outcomes[example.name]["outcome"] == "refused") for example in examples)


def test_an_answer_that_is_not_what_was_asked_is_found(client: httpx.Client, description: dict[str, Any]) -> None:
    def wrong(body: dict[str, Any], **changed: Any) -> list[str]:
        example = Example("", "", "/v1/chat/completions", body={"model": "bytes", "messages": [], **body})
        return list(faults(example, answer | changed, description))

    answer = client.post("/v1/chat/completions", json=WHOLE).json()
    [choice] = answer["choices"]
    ended = [{**choice, "finish_reason": "stop"}]
    assert wrong({}) == []
    assert wrong({"n": 2}) == ["1 choices"]
    assert "more than 3 tokens" in wrong({"max_tokens": 3})[0]
    assert "goes on behind its stop" in wrong({"stop": choice["message"]["content"][2:4]})[0]
    assert wrong({"guided_choice": ["a"]}, choices=ended)[0].startswith("none of the choices")
    assert "schema" in wrong({"response_format": {"json_schema": {"schema": {"type": "null"}}}}, choices=ended)[0]
    assert wrong({"store": True}) == ["neither known nor ignored: ['store']"]
    assert wrong({}, id=None)[0].startswith("openai cannot read id")
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}
    called = [{**choice, "message": {**choice["message"], "tool_calls": [call]}}]
    assert wrong({"tools": [{"function": {"name": "f", "parameters": {}}}]}, choices=called) == [
        "no call of a tool: f({)"
    ]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_stream_that_is_cut_off_is_found(client: httpx.Client, description: dict[str, Any], path: str) -> None:
    body = {"model": "bytes", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": True}
    example = Example("", "", path, body=body)
    events = send(client, example).answer
    assert list(faults(example, events, description)) == []
    found, *_ = faults(example, events[:-1], description)
    assert found.startswith(("the stream ends with", "not the events"))
