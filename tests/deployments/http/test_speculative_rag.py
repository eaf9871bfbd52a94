"""`speculative_rag` over HTTP: the chosen answer, what the answer tells of the choice, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

TEXT = "\n\n".join(f"Article {i}. Item {i * 13 % 97} is to be delivered by day {i * 7}." for i in range(20))


def body(rapid: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{TEXT}\n\nWhen is item 26 due?"}]
    asked = {"strategy": "speculative_rag", "num_answers": 3, **(rapid or {})}
    return {"model": "bytes", "messages": messages, "max_tokens": 20, "temperature": 0, "rapid": asked, **fields}


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()
    return answer


def test_an_answer_tells_of_the_choice_in_a_stream_and_whole(bytes_url: str) -> None:
    whole = post(bytes_url, body())
    told = whole["rapid"]["answers"]
    assert len(told) == 3 and [each["chosen"] for each in told].count(True) == 1
    best = max(told, key=lambda each: each["score"])
    assert best["chosen"] and all(len(each["chunks"]) == 2 for each in told)
    assert whole["usage"]["completion_tokens"] == whole["rapid"]["emitted"] == best["tokens"] == 20
    assert (whole["rapid"]["fallback"], whole["rapid"]["strategy"]) == (None, "speculative_rag")
    with httpx.stream(
        "POST", f"{bytes_url}/v1/chat/completions", json=body({"trace": True}, stream=True), timeout=120
    ) as stream:
        chunks = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    [traced] = [chunk["rapid_round"] for chunk in chunks if "rapid_round" in chunk]
    assert traced["source"] == "answers" and {token["origin"] for token in traced["tokens"]} == {"chosen"}
    assert text.startswith("".join(token["text"] for token in traced["tokens"])) and len(traced["tokens"]) == 20
    assert [each["chosen"] for each in chunks[-1]["rapid"]["answers"]].count(True) == 1


def test_ten_chunks_are_kept_whatever_the_configured_budget_is(bytes_url: str) -> None:
    """That is 64 tokens, so one chunk; a request's own budget counts."""
    assert len(post(bytes_url, body())["rapid"]["chunks"]) >= 10
    assert len(post(bytes_url, body({"retrieval": {"max_tokens": 130}}))["rapid"]["chunks"]) == 2


def test_a_grammar_holds_for_the_answer(bytes_url: str) -> None:
    schema = {"name": "due", "strict": True, "schema": {"enum": ["today", "never"]}}
    answer = post(bytes_url, body(response_format={"type": "json_schema", "json_schema": schema}))
    assert json.loads(answer["choices"][0]["message"]["content"]) in ("today", "never")
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("rapid", "fields", "param"),
    [
        ({"num_answers": 0}, {}, "rapid.num_answers"),
        ({"num_answers": 17}, {}, "rapid.num_answers"),
        ({"num_clusters": 11}, {}, "rapid.num_clusters"),
        ({}, {"logprobs": True}, "logprobs"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    bytes_url: str, rapid: dict[str, Any], fields: dict[str, Any], param: str
) -> None:
    assert post(bytes_url, body(rapid, **fields))["error"]["param"] == param


def test_rest_without_a_datastore_says_so(bytes_url: str) -> None:
    told = post(bytes_url, body({"strategy": "rest"}))["rapid"]
    assert (told["fallback"], told["drafted"]) == ("no_datastore", 0)
    assert post(bytes_url, body({"strategy": "rapid", "num_draft_tokens": 2}))["rapid"]["fallback"] is None
