"""`rapid.trace`: a stream that tells of its rounds, as they come."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai import OpenAI
from served import LETTERS, MODEL, chat


def traced(url: str, **rapid: Any) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """(text, rounds, the `rapid` object) of a greedy answer of letters."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    options: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "stream": True}
    extra = {"rapid": {"trace": True, **rapid}}
    chunks = list(client.completions.create(model="letters", prompt=LETTERS, extra_body=extra, **options))
    extras = [chunk.model_extra or {} for chunk in chunks]
    rounds = [more["rapid_round"] for more in extras if "rapid_round" in more]
    return "".join(choice.text for chunk in chunks for choice in chunk.choices), rounds, extras[-1]["rapid"]


@pytest.mark.parametrize("strategy", ["autoregressive", "lookup", "magicdec", "triforce", "rapid"])
def test_the_rounds_are_the_answer(letters_url: str, strategy: str) -> None:
    text, rounds, statistics = traced(letters_url, strategy=strategy, num_draft_tokens=4)
    tokens = [token for each in rounds for token in each["tokens"]]
    assert "".join(token["text"] for token in tokens) == text
    assert len(rounds) == statistics["rounds"]
    for name in ("drafted", "accepted"):
        assert sum(each[name] for each in rounds) == statistics[name]
    origins = [token["origin"] for token in tokens]
    assert sum(origins.count(drafted) for drafted in ("accepted", "lookup", "self")) == statistics["accepted"]
    assert origins.count("self") == (statistics["accepted"] if strategy in ("magicdec", "triforce") else 0)
    assert origins.count("lookup") == statistics["lookup_accepted"]
    if strategy == "autoregressive":
        assert set(origins) == {"plain"}


def test_a_rounds_last_token_is_named_by_what_became_of_the_draft(letters_url: str) -> None:
    _, rounds, _ = traced(letters_url, strategy="lookup", num_draft_tokens=4)
    for each in rounds[:-1]:
        stood = each["accepted"] == each["drafted"]
        expected = "plain" if not each["drafted"] else "bonus" if stood else "recovered"
        assert [token["origin"] for token in each["tokens"]] == ["lookup"] * each["accepted"] + [expected]
    assert {each["tokens"][-1]["origin"] for each in rounds} >= {"bonus", "recovered"}


def test_the_places_of_the_chunks_come_with_the_first_round(smollm_url: str) -> None:
    """γ is fixed, so the first round waits for the drafter, and with it for retrieval."""
    client = OpenAI(base_url=f"{smollm_url}/v1", api_key="none", max_retries=0)
    extra = {"rapid": {"trace": True, "num_draft_tokens": 2}}
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "stream": True}
    *_, last = chunks = list(client.chat.completions.create(model=MODEL, messages=chat(), extra_body=extra, **options))
    rounds = [chunk.model_extra["rapid_round"] for chunk in chunks if "rapid_round" in (chunk.model_extra or {})]
    told = [each["chunks"] for each in rounds if "chunks" in each]
    assert told == [rounds[0]["chunks"]] == [(last.model_extra or {})["rapid"]["chunks"]]
    document = chat()[0]["content"]
    for chunk in told[0]:
        assert chunk["content"] == 0 and document[chunk["start"] : chunk["end"]].strip()


def test_a_stream_that_asks_for_no_trace_has_none(letters_url: str) -> None:
    _, rounds, _ = traced(letters_url, trace=False)
    assert not rounds


def test_a_whole_answer_has_no_rounds_to_tell_of(letters_url: str) -> None:
    body = {"model": "letters", "prompt": "abc", "rapid": {"trace": True}}
    answer = httpx.post(f"{letters_url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "rapid.trace"
    assert "set stream to true" in answer.json()["error"]["message"]
