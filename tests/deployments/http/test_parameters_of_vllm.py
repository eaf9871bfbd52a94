"""Parameters that vLLM's users send, and those that only sampling shows at work."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from served import LETTERS
from test_parameters import STRATEGIES, client, write

VOCABULARY = "\n abcdefghij"
LOSSLESS = [*STRATEGIES[:3], {"strategy": "rapid", "num_draft_tokens": 3, "verification": "lossless"}]


@pytest.mark.parametrize("rapid", LOSSLESS, ids=str)
@pytest.mark.parametrize("only_the_likeliest", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_what_leaves_one_token_is_greedy(
    letters_url: str, rapid: dict[str, Any], only_the_likeliest: dict[str, Any]
) -> None:
    sampled = {"temperature": 1, "seed": 1}
    greedy = write(letters_url, rapid).choices[0].text
    assert write(letters_url, rapid, **sampled, **only_the_likeliest).choices[0].text == greedy
    assert write(letters_url, rapid, **sampled).choices[0].text != greedy


@pytest.mark.parametrize("rapid", STRATEGIES, ids=str)
def test_a_seed_repeats_and_another_does_not(letters_url: str, rapid: dict[str, Any]) -> None:
    texts = [write(letters_url, rapid, temperature=1, seed=seed).choices[0].text for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_max_completion_tokens_is_max_tokens(bytes_url: str) -> None:
    options: dict[str, Any] = {"model": "bytes", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
    answer = client(bytes_url).chat.completions.create(
        **options, max_completion_tokens=3, extra_body={"ignore_eos": True}
    )
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


@pytest.mark.parametrize("rapid", STRATEGIES, ids=str)
def test_a_stop_token_ends_the_text_and_is_not_in_it(letters_url: str, rapid: dict[str, Any]) -> None:
    whole = write(letters_url, rapid).choices[0].text
    before, last, _ = whole.partition(whole[10])
    answer = write(letters_url, rapid, stop_token_ids=[VOCABULARY.index(last)], logprobs=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (before, "stop")
    assert answer.usage.completion_tokens == len(before) + 1
    assert "".join(choice.logprobs.tokens) == before


@pytest.mark.parametrize("rapid", STRATEGIES, ids=str)
def test_no_end_comes_before_min_tokens(letters_url: str, rapid: dict[str, Any]) -> None:
    whole = write(letters_url, rapid).choices[0].text
    late = write(letters_url, rapid, min_tokens=8, stop=[whole[2]]).choices[0].text
    assert late == whole[:8] + whole[8:].partition(whole[2])[0]
    options: dict[str, Any] = {"min_tokens": 8, "stop_token_ids": [VOCABULARY.index(whole[2])]}
    expected = write(letters_url, STRATEGIES[0], **options).choices[0]
    other = write(letters_url, rapid, **options).choices[0]
    assert (other.text, other.finish_reason) == (expected.text, expected.finish_reason)
    assert whole[2] not in other.text and len(other.text) >= 8


@pytest.mark.parametrize("rapid", STRATEGIES, ids=str)
def test_a_prompt_may_be_its_tokens(letters_url: str, rapid: dict[str, Any]) -> None:
    tokens = [VOCABULARY.index(letter) for letter in LETTERS]
    expected = write(letters_url, rapid)
    for prompt in (tokens, [tokens], [LETTERS]):
        answer = write(letters_url, rapid, prompt=prompt, echo=True)
        assert answer.choices[0].text == LETTERS + expected.choices[0].text
        assert answer.usage.prompt_tokens == expected.usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_needs_no_tokens(letters_url: str, stream: bool) -> None:
    answer = write(letters_url, {}, max_tokens=0, echo=True, n=2, stream=stream)
    texts, reasons = ["", ""], set()
    for body in answer if stream else [answer]:
        for choice in body.choices:
            texts[choice.index] += choice.text
            reasons.add(choice.finish_reason)
    assert texts == [LETTERS, LETTERS] and "length" in reasons
    assert stream or (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(LETTERS), 0)
    too_long = {"model": "letters", "prompt": "a" * 9000, "max_tokens": 0, "echo": True}
    refused = httpx.post(f"{letters_url}/v1/completions", json=too_long).json()["error"]
    assert (refused["code"], refused["param"]) == ("context_length_exceeded", "prompt")


def test_a_token_that_is_not_among_the_likeliest_is_named_beside_them(letters_url: str) -> None:
    logprobs = write(letters_url, {}, temperature=3, seed=1, logprobs=1).choices[0].logprobs
    for token, own, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == own and len(top) in (1, 2)
    assert any(len(top) == 2 for top in logprobs.top_logprobs)


def test_the_chat_template_is_given_its_variables(bytes_url: str) -> None:
    messages = [{"role": "user", "content": "Hi"}]

    def ask(path: str, **kwargs: Any) -> Any:
        body = {"model": "bytes", "messages": messages, "chat_template_kwargs": kwargs}
        body |= {} if path == "tokenize" else {"max_tokens": 1}
        return httpx.post(f"{bytes_url}/{path}", json=body).json()

    tokens = ask("tokenize", mood="glad")["tokens"]
    assert httpx.post(f"{bytes_url}/detokenize", json={"tokens": tokens}).json()["prompt"].startswith("(glad)[user]Hi")
    assert ask("v1/chat/completions", mood="glad")["usage"]["prompt_tokens"] == len(tokens)
    for name in ("enable_thinking", "tokenize", "chat_template", "messages", "tools"):
        assert ask("v1/chat/completions", **{name: True})["error"]["param"] == f"chat_template_kwargs.{name}"
