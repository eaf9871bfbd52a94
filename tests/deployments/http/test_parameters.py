"""OpenAI's parameters, asked for by OpenAI's client: each works, with speculation as without, or is refused by name."""

from __future__ import annotations

from functools import cache
from typing import Any

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from served import LETTERS, MODEL, chat, health

STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "autoregressive"},
    {"strategy": "lookup", "num_draft_tokens": 4},
    {"strategy": "speculative", "num_draft_tokens": 3},
    {"strategy": "magicdec", "num_draft_tokens": 3, "draft_cache_tokens": 32},
    {"strategy": "triforce", "num_draft_tokens": 3, "draft_cache_tokens": 32},
    {"strategy": "rapid", "num_draft_tokens": 3},
    {"strategy": "rapid"},
]
OURS = {
    "top_k",
    "min_p",
    "repetition_penalty",
    "ignore_eos",
    "stop_token_ids",
    "min_tokens",
}  # which OpenAI's client sends in extra_body


@cache  # nobody closes it, and the collector might take its socket before its client
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def write(url: str, rapid: dict[str, Any], **options: Any) -> Any:
    """A completion of letters, of 24 tokens and greedy unless ``options`` say otherwise."""
    extra = {"rapid": rapid, **{name: options.pop(name) for name in OURS & options.keys()}}
    options = {"max_tokens": 24, "temperature": 0, "model": "letters", "prompt": LETTERS, **options}
    return client(url).completions.create(**options, extra_body=extra)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logit_bias": {"3": 2.5, "4": -100}},
        {"presence_penalty": 1.1},
        {"frequency_penalty": 0.9},
        {"repetition_penalty": 1.3},
        {"ignore_eos": True},
        {"stop": ["jjj", "zz"]},
        {"max_tokens": 5},
        {"n": 2, "user": "someone"},
        {"top_p": 0.5, "top_k": 3, "min_p": 0.1},
        {"echo": True, "best_of": 1},
        {"logprobs": 3},
        {"seed": 5},
    ],
    ids=str,
)
def test_greedy_text_is_the_same_by_every_strategy(letters_url: str, options: dict[str, Any]) -> None:
    expected, *others = [write(letters_url, rapid, **options) for rapid in STRATEGIES]
    assert any(other.choices[0].text for other in others)
    for answer in others:
        for ours, plain in zip(answer.choices, expected.choices, strict=True):
            assert (ours.text, ours.finish_reason) == (plain.text, plain.finish_reason)
        assert answer.usage.completion_tokens == expected.usage.completion_tokens
        assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    drafted = [(o.model_extra or {}).get("rapid") or o.choices[0].model_extra["rapid"] for o in others]
    assert any(statistics["drafted"] for statistics in drafted)
    assert health(letters_url)["sequences"] == {"target": 0, "drafter": 0}


@pytest.mark.parametrize("rapid", STRATEGIES[1:], ids=str)
def test_a_bias_and_a_penalty_change_the_text(letters_url: str, rapid: dict[str, Any]) -> None:
    plain = write(letters_url, rapid).choices[0].text
    banned = write(letters_url, rapid, logit_bias={str(i): -100 for i in range(2, 11)}).choices[0].text
    assert set(banned) <= {"\n", " ", "j"}
    assert write(letters_url, rapid, frequency_penalty=2).choices[0].text not in (plain, banned)


@pytest.mark.parametrize("rapid", STRATEGIES, ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_nothing_of_a_stop_string_or_behind_it_is_seen(letters_url: str, rapid: dict[str, Any], stream: bool) -> None:
    whole = write(letters_url, rapid, max_tokens=40).choices[0].text
    stop = whole[10:13]  # three tokens
    answer = write(letters_url, rapid, max_tokens=40, stop=[stop], stream=stream, logprobs=1)
    if stream:
        chunks = list(answer)
        text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
        tokens = [t for chunk in chunks for c in chunk.choices if c.logprobs for t in c.logprobs.tokens]
    else:
        text, tokens = answer.choices[0].text, answer.choices[0].logprobs.tokens
    assert text == whole[: whole.find(stop)]
    assert "".join(tokens) == text


@pytest.mark.parametrize("rapid", STRATEGIES, ids=str)
def test_logprobs_of_both_endpoints(letters_url: str, rapid: dict[str, Any]) -> None:
    expected = write(letters_url, STRATEGIES[0], logprobs=2).choices[0].logprobs
    logprobs = write(letters_url, rapid, logprobs=2).choices[0].logprobs
    assert logprobs.tokens == expected.tokens
    assert logprobs.text_offset == list(range(24))
    for ours, plain, top in zip(logprobs.token_logprobs, expected.token_logprobs, logprobs.top_logprobs, strict=True):
        assert abs(ours - plain) < 1e-4
        assert len(top) == 2 and max(top.values()) == ours
    streamed = [c.choices[0] for c in write(letters_url, rapid, logprobs=2, stream=True)]
    assert [offset for part in streamed if part.logprobs for offset in part.logprobs.text_offset] == list(range(24))


def test_chat_logprobs_have_bytes_and_alternatives(smollm_url: str) -> None:
    answer = client(smollm_url).chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Write three emojis and nothing else."}],
        max_tokens=12,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    content = answer.choices[0].logprobs.content
    assert (
        bytes(byte for token in content for byte in token.bytes)
        .decode(errors="replace")
        .startswith(answer.choices[0].message.content.rstrip("�"))
    )
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob  # greedy


@pytest.mark.parametrize("rapid", STRATEGIES, ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_those_of_single_requests_with_the_next_seeds(
    letters_url: str, rapid: dict[str, Any], stream: bool
) -> None:
    options = {"temperature": 1, "seed": 7}
    singles = [write(letters_url, rapid, **options | {"seed": 7 + i}).choices[0].text for i in range(3)]
    assert len(set(singles)) == 3
    answer = write(letters_url, rapid, n=3, stream=stream, **options)
    texts = ["", "", ""]
    for body in answer if stream else [answer]:
        for choice in body.choices:
            texts[choice.index] += choice.text
    assert texts == singles
    if not stream:
        assert answer.usage.completion_tokens == 3 * 24
        assert answer.usage.total_tokens == len(LETTERS) + 3 * 24
        assert all(choice.model_extra["rapid"]["emitted"] == 24 for choice in answer.choices)


def test_a_prompt_is_read_once_for_all_choices(smollm_url: str) -> None:
    options = {"model": MODEL, "messages": chat(5), "max_tokens": 4, "n": 3}
    answer = client(smollm_url).chat.completions.create(**options)
    cached = sorted(choice.model_extra["rapid"]["cached_tokens"] for choice in answer.choices)
    assert cached[0] < 50 < answer.usage.prompt_tokens
    state = health(smollm_url)
    assert not any(state["sequences"].values())


def test_echo_streamed_and_whole(letters_url: str) -> None:
    plain = write(letters_url, STRATEGIES[0]).choices[0].text
    assert write(letters_url, {}, echo=True).choices[0].text == LETTERS + plain
    chunks = list(write(letters_url, {}, echo=True, stream=True, n=2))
    for i in range(2):
        assert "".join(c.text for chunk in chunks for c in chunk.choices if c.index == i) == LETTERS + plain


def test_usage_is_the_last_chunk_where_it_is_asked_for(letters_url: str) -> None:
    *_, last = write(letters_url, {}, n=2, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.completion_tokens == 48


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("n", {"n": 9}),
    ("n", {"n": 0}),
    ("best_of", {"best_of": 9}),
    ("best_of", {"best_of": 1, "n": 2}),
    ("best_of", {"best_of": 3, "stream": True}),
    ("best_of", {"best_of": 3, "rapid": {"strategy": "speculative_rag"}}),
    ("prompt_logprobs", {"prompt_logprobs": 21}),
    ("logprobs", {"logprobs": 21}),
    ("logit_bias", {"logit_bias": {"3": 101}}),
    ("logit_bias", {"logit_bias": {"99": 1}}),
    ("presence_penalty", {"presence_penalty": 2.5}),
    ("frequency_penalty", {"frequency_penalty": -2.5}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("max_tokens", {"max_tokens": 0}),
    ("stop", {"stop": ["a"] * 65}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("suffix", {"suffix": "x"}),
    ("prompt", {"prompt": ["a", ""]}),
    ("prompt", {"prompt": [[1], [99]]}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": [99]}),
    ("prompt", {"prompt": [1, "a"]}),
    ("stop_token_ids", {"stop_token_ids": [99]}),
    ("stop_token_ids", {"stop_token_ids": list(range(12)), "min_tokens": 2}),
    ("min_tokens", {"min_tokens": 5}),
    ("response_format", {"response_format": {"type": "grammar"}}),
    ("response_format", {"response_format": {"type": "json_object"}}),  # this model has no end of sequence
]


@pytest.mark.parametrize(("param", "options"), REFUSED, ids=str)
def test_a_completion_s_parameter_is_refused_by_name(letters_url: str, param: str, options: dict[str, Any]) -> None:
    body = {"model": "letters", "prompt": "abc", "max_tokens": 4, **options}
    answer = httpx.post(f"{letters_url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert param in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("param", "options"),
    [
        *((name, {name: value}) for name, value in {
            "modalities": ["text", "audio"],
            "audio": {},
            "functions": [{"name": "f g"}],
            "function_call": {"name": "f"},
            "web_search_options": {},
            "best_of": 2,
            "echo": True,
        }.items()),
        ("top_logprobs", {"top_logprobs": 2}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_calls", {"messages": [{"role": "user", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}]}),
        ("continue_final_message", {"continue_final_message": True}),
        ("continue_final_message", {"continue_final_message": True, "add_generation_prompt": True}),
        ("truncate_prompt_tokens", {"truncate_prompt_tokens": 0}),
        ("structured_outputs", {"structured_outputs": {}}),
        ("structured_outputs", {"structured_outputs": {"regex": "a", "choice": ["b"]}}),
        ("structured_outputs", {"structured_outputs": {"regex": "("}}),
        ("guided_json", {"guided_json": {}, "guided_regex": "a"}),
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "nothing"}}}}),
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "array", "uniqueItems": True}}}}),
        ("ignore_eos", {"ignore_eos": True, "response_format": {"type": "json_object"}}),
    ],
    ids=str,
)  # fmt: skip
def test_a_chat_s_parameter_is_refused_by_name(smollm_url: str, param: str, options: dict[str, Any]) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **options}
    answer = httpx.post(f"{smollm_url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert param in error["message"]
    assert error["type"] == "invalid_request_error"


def test_the_client_s_own_errors(letters_url: str) -> None:
    with pytest.raises(BadRequestError, match="suffix"):
        write(letters_url, {}, suffix="x")
    with pytest.raises(NotFoundError, match="'other' is not served here") as caught:
        client(letters_url).models.retrieve("other")
    assert caught.value.body == {"message": "the model 'other' is not served here; 'letters' is", "param": "model",
                                 "type": "invalid_request_error", "code": "model_not_found"}  # fmt: skip


def test_models_tokens_and_version(smollm_url: str) -> None:
    model = client(smollm_url).models.retrieve(MODEL)
    window = model.model_extra["max_model_len"]
    assert (model.id, window) == (MODEL, client(smollm_url).models.list().data[0].model_extra["max_model_len"])

    def ask(path: str, **body: Any) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.post(f"{smollm_url}/{path}", json=body).json()
        return answer

    plain = ask("tokenize", prompt="Hello wörld", return_token_strs=True)
    assert (plain["count"], plain["max_model_len"]) == (len(plain["tokens"]), window)
    assert len(plain["token_strs"]) == plain["count"]
    assert ask("detokenize", model=MODEL, tokens=plain["tokens"]) == {"prompt": "Hello wörld"}
    messages = [{"role": "user", "content": "Hi"}]
    answer = client(smollm_url).chat.completions.create(model=MODEL, messages=messages, max_tokens=1)
    assert ask("tokenize", model=MODEL, messages=messages)["count"] == answer.usage.prompt_tokens
    assert "there is no token 99999999" in ask("detokenize", tokens=[99999999])["error"]["message"]
    assert "either prompt or messages" in ask("tokenize")["error"]["message"]
    assert ask("tokenize", model="x", prompt="y")["error"]["code"] == "model_not_found"
    assert httpx.get(f"{smollm_url}/version").json()["version"]


@pytest.mark.parametrize("strategy", ["autoregressive", "lookup", "rapid"])
def test_best_of_gives_out_the_likeliest_choices_and_counts_all(letters_url: str, strategy: str) -> None:
    rapid = {"strategy": strategy}
    every = write(letters_url, rapid, n=4, logprobs=0, temperature=1, seed=7)
    means = {choice.text: sum(choice.logprobs.token_logprobs) / 24 for choice in every.choices}
    assert len(means) == 4
    best = write(letters_url, rapid, n=2, best_of=4, temperature=1, seed=7)
    assert [choice.text for choice in best.choices] == sorted(means, key=lambda text: -means[text])[:2]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.choices[0].logprobs is None
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(best.usage, count) == getattr(every.usage, count)
