"""The HTTP API over engines in this process: all that Ray takes no part in."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI, RateLimitError
from served import MODEL, chat, health, seconds_until_free


@pytest.fixture(scope="module")
def url(smollm_url: str) -> str:
    return smollm_url


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


RULES = ["published", "reference", "augmented", "lossless"]


@pytest.mark.parametrize(
    "rapid",
    [
        {"strategy": "autoregressive"},
        {"strategy": "lookup"},
        {"strategy": "speculative", "num_draft_tokens": 4},
        {"strategy": "rapid", "num_draft_tokens": "auto"},
        *({"strategy": "rapid", "verification": rule, "num_draft_tokens": 10} for rule in RULES),
        {"strategy": "rapid", "num_draft_tokens": 1},
    ],
    ids=lambda rapid: "-".join(str(value) for value in rapid.values()),
)
def test_greedy_over_http_is_transformers_greedy(client: OpenAI, expected: str, rapid: dict[str, Any]) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=chat(), max_tokens=24, temperature=0, extra_body={"rapid": rapid}
    )
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 24
    statistics = answer.model_extra["rapid"]  # type: ignore[index]
    assert statistics["strategy"] == rapid["strategy"]
    if rapid["strategy"] == "autoregressive":
        assert statistics["rounds"] == 24 and statistics["drafted"] == 0
    elif isinstance(rapid.get("num_draft_tokens"), int):  # then the first round waits for the drafter
        assert statistics["rounds"] < 24 and 0 < statistics["accepted"] <= statistics["drafted"]
        assert 0 < statistics["retrieved_tokens"] < statistics["context_tokens"]
        assert all(chunk["score"] >= 0.1 for chunk in statistics["chunks"])
        assert statistics["timings_ms"]["drafting"] > 0


def test_completions_and_stop_strings(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": "1, 2, 3, 4, 5,", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**options)
    text = whole.choices[0].text
    assert len(text) > 10 and whole.model_extra["rapid"]["fallback"] == "no_long_context"
    stop = text[6:9]
    stopped = client.completions.create(**options, stop=[stop])
    assert stopped.choices[0].text == text[: text.index(stop)] and stopped.choices[0].finish_reason == "stop"
    streamed = "".join(c.choices[0].text for c in client.completions.create(**options, stop=stop, stream=True))
    assert streamed == text[: text.index(stop)]


def test_a_seed_repeats_and_seeds_differ(client: OpenAI) -> None:
    def answer(seed: int) -> str | None:
        options: dict[str, Any] = {"max_tokens": 16, "temperature": 1.0, "seed": seed}
        return client.chat.completions.create(model=MODEL, messages=chat(), **options).choices[0].message.content

    assert answer(1) == answer(1) != answer(2)


def test_nothing_retrieved_says_so_and_decodes_plainly(client: OpenAI) -> None:
    rapid = {"strategy": "speculative", "num_draft_tokens": 4, "retrieval": {"threshold": 0.99}}
    answer = client.chat.completions.create(
        model=MODEL, messages=chat(), max_tokens=4, temperature=0, extra_body={"rapid": rapid}
    )
    statistics = answer.model_extra["rapid"]  # type: ignore[index]
    assert statistics["fallback"] == "nothing_above_threshold" and statistics["rounds"] == 4


HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"messages": None}, "messages", "required"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "assistant"),
        ({"rapid": {"stratgy": "rapid"}}, "rapid.stratgy", "unknown field"),
        ({"rapid": {"strategy": "magic"}}, "rapid.strategy", "autoregressive"),
        ({"rapid": {"verification": "none"}}, "rapid.verification", "lossless"),
        ({"rapid": {"num_draft_tokens": 1000}}, "rapid.num_draft_tokens", "64"),
        ({"rapid": {"retrieval": {"threshold": 2}}}, "rapid.retrieval.threshold", "1"),
        ({"temperature": "0.5"}, "temperature", "number"),
        ({"temperature": -1}, "temperature", "between"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"max_tokens": 0}, "max_tokens", "greater"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"n": 0}, "n", "greater"),
        ({"stop": ["a"] * 5}, None, "stop"),
        ({"no_such_field": 1}, "no_such_field", "unknown field"),
        ({"NoSuchField": 1}, "NoSuchField", "unknown field"),
        ({"": 1}, None, "unknown field"),
    ],
)
def test_bad_fields_are_named(url: str, change: dict[str, Any], param: str | None, says: str) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", json=HELLO | change, timeout=30)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert says in error["message"]


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe\x00", b"[]", b'"x"', b"", b'{"model": "' + b"\\ud800" + b'"}'])
def test_bodies_that_are_no_request(url: str, body: bytes) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", content=body, timeout=30)
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_openai_client_raises_its_own_errors(client: OpenAI, url: str) -> None:
    with pytest.raises(NotFoundError, match="gpt-9"):
        client.chat.completions.create(model="gpt-9", messages=chat())
    with pytest.raises(BadRequestError, match="8192 tokens, but") as caught:
        client.completions.create(model=MODEL, prompt="word " * 9000, max_tokens=10, stream=True)
    assert caught.value.code == "context_length_exceeded"
    assert httpx.get(f"{url}/nowhere").json()["error"]["message"] == "there is no /nowhere"
    assert httpx.put(f"{url}/v1/files/x").headers["Allow"] == "DELETE, GET"
    assert RateLimitError.status_code == 429


def test_health_says_what_is_held(letters_url: str) -> None:
    state = health(letters_url)
    assert state["status"] == "ok" and state["sequences"] == state["kv_bytes"] == {"target": 0, "drafter": 0}


def test_leaving_several_choices_frees_them_all(letters_url: str) -> None:
    client = OpenAI(base_url=f"{letters_url}/v1", api_key="none", max_retries=0)
    rapid = {"strategy": "autoregressive"}
    stream = client.completions.create(
        model="letters", prompt="abc", n=3, max_tokens=4000, stream=True, extra_body={"rapid": rapid}
    )
    next(iter(stream))
    assert health(letters_url)["sequences"]["target"] == 3
    stream.close()
    seconds_until_free(letters_url)
