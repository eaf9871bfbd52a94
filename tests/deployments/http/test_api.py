"""The HTTP API over engines in this process: all that Ray takes no part in."""

from __future__ import annotations

import re
from functools import cache, partial
from typing import Any

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI, RateLimitError
from served import MODEL, chat, health, seconds_until_free


@pytest.fixture(scope="module")
def url(smollm_url: str) -> str:
    return smollm_url


@pytest.fixture(scope="module")
@cache  # nobody closes it, and the collector might take its socket before its client
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


RULES = ["published", "reference", "augmented", "lossless"]


@pytest.mark.parametrize(
    "rapid",
    [
        {"strategy": "autoregressive"},
        {"strategy": "lookup"},
        {"strategy": "speculative", "num_draft_tokens": 4},
        {"strategy": "magicdec", "draft_cache": "window", "draft_cache_tokens": 64, "num_draft_tokens": 4},
        {"strategy": "triforce", "draft_cache_tokens": 64, "num_draft_tokens": 4},
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
        assert statistics["timings_ms"]["drafting"] > 0
        if rapid["strategy"] in ("magicdec", "triforce"):
            return  # nothing is retrieved
        assert 0 < statistics["retrieved_tokens"] < statistics["context_tokens"]
        assert max(chunk["score"] for chunk in statistics["chunks"]) >= 0.1  # what hybrid retrieval asks of one


def test_a_greedy_transfer_over_http_does_not_depend_on_gamma(client: OpenAI, expected: str) -> None:
    """It says what was chosen; without a transfer it says nothing of one."""

    def ask(**rapid: Any) -> tuple[str | None, dict[str, Any]]:
        answer = client.chat.completions.create(
            model=MODEL, messages=chat(), max_tokens=24, temperature=0, extra_body={"rapid": rapid}
        )
        return answer.choices[0].message.content, answer.model_extra["rapid"]  # type: ignore[index]

    how: dict[str, Any] = {"transfer_strength": "auto", "transfer_divergence": 1.0, "transfer_temperature": 1.0}
    (text, statistics), *others = [ask(**how, num_draft_tokens=gamma) for gamma in (1, 4, "auto")]
    assert [other for other, _ in others] == [text] * 2
    transfer = statistics["transfer"]
    assert transfer["positions"] == 24
    # The passages may be so unlike the question that retrieval is not sure of them at all; then nothing is moved.
    assert 0 <= transfer["divergence"] <= transfer["bound"] + 1e-4 <= transfer["confidence"] + 2e-4
    assert 0 <= transfer["strength"] <= 50 and 0 <= transfer["uncertainty"] <= 1 and 0 < transfer["agreement"] <= 1
    text, statistics = ask(num_draft_tokens=4)
    assert text == expected and statistics["transfer"] is None


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


def test_nothing_above_the_threshold_says_so_and_writes_the_target_s_own_text(client: OpenAI) -> None:
    def answer(**rapid: Any) -> Any:
        options: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "extra_body": {"rapid": rapid}}
        return client.chat.completions.create(model=MODEL, messages=chat(), **options)

    drafted = answer(strategy="speculative", num_draft_tokens=4, retrieval={"threshold": 0.99})
    statistics = drafted.model_extra["rapid"]
    assert statistics["fallback"] == "nothing_above_threshold" and statistics["drafted"] > 0
    plain = answer(strategy="autoregressive")
    assert drafted.choices[0].message.content == plain.choices[0].message.content


@pytest.mark.parametrize("method", ["dense", "sparse", "hybrid"])
def test_each_way_to_retrieve_says_how_sure_it_is(client: OpenAI, method: str) -> None:
    rapid = {"strategy": "rag", "retrieval": {"method": method, "threshold": -1}}
    answer = client.chat.completions.create(model=MODEL, messages=chat(), max_tokens=1, extra_body={"rapid": rapid})
    statistics = answer.model_extra["rapid"]  # type: ignore[index]
    assert 0 < statistics["confidence"] < 1 and statistics["chunks"]


def test_a_context_has_only_so_many_chunks(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is embedded, so small ones of a long context are dear."""
    monkeypatch.setattr("deployments.schemas.completions.MAX_CHUNKS", 3)
    ask = partial(client.chat.completions.create, model=MODEL, messages=chat(), max_tokens=1)
    with pytest.raises(BadRequestError, match="in chunks of at least") as caught:
        ask(extra_body={"rapid": {"retrieval": {"chunk_tokens": 16}}})
    assert caught.value.param == "rapid.retrieval.chunk_tokens"
    with pytest.raises(BadRequestError):
        ask(extra_body={"rapid": {"retrieval": {"max_tokens": 16}}})
    ask(extra_body={"rapid": {"retrieval": {"chunk_tokens": 4096}}})


# Short: what is not refused is answered.
HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}


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
        ({"rapid": {"transfer_strength": "much"}}, "rapid.transfer_strength", "auto"),
        ({"rapid": {"transfer_strength": 1001}}, "rapid.transfer_strength", "1000"),
        ({"rapid": {"transfer_temperature": -1}}, "rapid.transfer_temperature", "between 0 and 10"),
        ({"rapid": {"transfer_divergence": -1}}, "rapid.transfer_divergence", "nats"),
        ({"rapid": {"refresh": "always"}}, "rapid.refresh", "auto"),
        ({"rapid": {"retrieval": {"threshold": 2}}}, "rapid.retrieval.threshold", "1"),
        ({"rapid": {"retrieval": {"method": "magic"}}}, "rapid.retrieval.method", "hybrid"),
        ({"rapid": {"retrieval": {"rerank_candidates": 0}}}, "rapid.retrieval.rerank_candidates", "1"),
        ({"rapid": {"retrieval": {"chunk_tokens": 15}}}, "rapid.retrieval.chunk_tokens", "16"),
        ({"rapid": {"retrieval": {"max_tokens": 15}}}, "rapid.retrieval.max_tokens", "16"),
        ({"temperature": "0.5"}, "temperature", "number"),
        ({"temperature": -1}, "temperature", "between"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"max_tokens": 0}, "max_tokens", "greater"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"n": 0}, "n", "greater"),
        ({"stop": ["a"] * 65}, "stop", "64 strings"),
        ({"stop": "a" * 5000}, "stop", "4096 characters"),
        ({"stop": 1}, "stop", "valid string or must be a list"),
        ({"stop": ["a", 1]}, "stop.1", "valid string"),
        ({"tool_choice": "always"}, "tool_choice", "must be 'none', 'auto' or 'required'"),
        ({"tool_choice": {"type": "function", "function": {"name": 1}}}, "tool_choice.function.name", "valid string"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a", "its name must be a valid integer"),
        ({"logit_bias": {"5": "a"}}, "logit_bias.5", "valid number"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema", "unknown field"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema.schema", "required"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "must be one of 'text'"),
        ({"response_format": {}}, "response_format.type", "required"),
        ({"rapid": []}, "rapid", "must be an object"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0", "text and file"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
         "messages.0.content.0.text", "valid string"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]},
         "messages.0.content.0.file", "either file_id or file_data"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"stream_options": {}}, "stream_options", "stream is false"),
        ({"no_such_field": 1}, "no_such_field", "unknown field"),
        ({"NoSuchField": 1}, "NoSuchField", "unknown field"),
        ({"": 1}, None, "unknown field"),
    ],
)  # fmt: skip
def test_bad_fields_are_named(url: str, change: dict[str, Any], param: str | None, says: str) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", json=HELLO | change, timeout=30)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert says in error["message"] and not re.search("Value error|Input should|literal|NamedTool", error["message"])


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe\x00", b"[]", b'"x"', b"", b'{"model": "' + b"\\ud800" + b'"}'])
def test_bodies_that_are_no_request(url: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers, timeout=30)
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["v1/chat/completions", "v1/completions", "tokenize", "detokenize"])
def test_a_body_that_is_not_said_to_be_json_is_not_read(letters_url: str, path: str) -> None:
    """Such a one any web page may send to a server on its reader's machine, without asking first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json", ""):
        answer = httpx.post(f"{letters_url}/{path}", content=b"{}", headers={"Content-Type": kind})
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    for kind in ("Application/JSON; charset=utf-8", "application/vnd.api+json"):
        answer = httpx.post(f"{letters_url}/{path}", content=b"{}", headers={"Content-Type": kind})
        assert answer.status_code == 400


def test_openai_client_raises_its_own_errors(client: OpenAI, url: str) -> None:
    with pytest.raises(NotFoundError, match="gpt-9"):
        client.chat.completions.create(model="gpt-9", messages=chat())
    with pytest.raises(BadRequestError, match="8192 tokens, but") as caught:
        client.completions.create(model=MODEL, prompt="word " * 9000, max_tokens=10, stream=True)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(BadRequestError, match="8192 tokens, but") as caught:
        client.chat.completions.create(model=MODEL, messages=chat(), max_tokens=9000)
    assert caught.value.param == "messages"
    assert httpx.get(f"{url}/nowhere").json()["error"]["message"] == "there is no /nowhere"
    assert httpx.put(f"{url}/v1/files/x").headers["Allow"] == "DELETE, GET"
    assert httpx.put(f"{url}/v1/responses/input_tokens").headers["Allow"] == "POST"  # though an id would match, too
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
