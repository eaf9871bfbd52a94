"""The prompt's own log-probabilities: `echo` with `logprobs`, as lm-eval asks, and vLLM's `prompt_logprobs`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from served import local_api
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "The cat sat — on the mat.\n"
ASK: dict[str, Any] = {"model": "bytes", "prompt": PROMPT, "max_tokens": 3, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def float_url(bytes_folder: Path) -> Iterator[str]:
    engine = {"model": str(bytes_folder), "dtype": "float32", "kv_memory_gib": 0.1, "threads": 1}
    with local_api({"served_model": "bytes", "target": engine, "drafter": engine}) as url:
        yield url


def complete(url: str, **more: Any) -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/completions", json={**ASK, **more}, timeout=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def directly(folder: Path, tokens: list[int]) -> torch.Tensor:
    """[n - 1, V]: transformers' log-probabilities in the place of each token but the first."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return network(torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("strategy", ["autoregressive", "lookup", "rapid"])
def test_an_echoed_prompt_has_the_log_probabilities_of_transformers(
    float_url: str, bytes_folder: Path, strategy: str
) -> None:
    tokens = AutoTokenizer.from_pretrained(bytes_folder).encode(PROMPT)
    expected = directly(bytes_folder, tokens)
    plain = complete(float_url, logprobs=2, rapid={"strategy": strategy})["choices"][0]
    [choice] = complete(float_url, echo=True, logprobs=2, rapid={"strategy": strategy})["choices"]
    logprobs, size = choice["logprobs"], len(tokens)
    assert choice["text"] == PROMPT + plain["text"]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    own = expected.gather(-1, torch.tensor(tokens[1:]).unsqueeze(-1)).flatten().tolist()
    assert logprobs["token_logprobs"][1:size] == pytest.approx(own, abs=1e-3)
    for found, row in zip(logprobs["top_logprobs"][1:size], expected, strict=True):
        assert sorted(found.values())[-2:] == pytest.approx(sorted(row.tolist())[-2:], abs=1e-3)
    assert logprobs["tokens"][size:] == plain["logprobs"]["tokens"]
    assert logprobs["token_logprobs"][size:] == plain["logprobs"]["token_logprobs"]
    spelled = [t.encode() if not t.startswith("bytes:") else bytes([int(t[8:], 16)]) for t in logprobs["tokens"]]
    for offset, before in zip(logprobs["text_offset"], (b"".join(spelled[:i]) for i in range(size)), strict=False):
        assert offset == len(before.decode(errors="ignore"))


def test_prompts_without_an_answer_as_tokens_and_several_at_once(float_url: str, bytes_folder: Path) -> None:
    """What lm-eval sends for a log-likelihood."""
    prompts = [[5, 6, 7, 8], [9], [30, 31, 32]]
    choices = complete(float_url, prompt=prompts, max_tokens=0, echo=True, logprobs=1, seed=1234)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    for tokens, choice in zip(prompts, choices, strict=True):
        assert len(choice["logprobs"]["tokens"]) == len(tokens) and choice["finish_reason"] == "length"
        expected = directly(bytes_folder, tokens) if len(tokens) > 1 else torch.zeros(0, 257)
        own = [float(row[token]) for row, token in zip(expected, tokens[1:], strict=True)]
        assert choice["logprobs"]["token_logprobs"] == [None, *(pytest.approx(value, abs=1e-3) for value in own)]
        for top, row in zip(choice["logprobs"]["top_logprobs"][1:], expected, strict=True):
            assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-3)


def test_prompt_logprobs_are_by_id_and_have_ranks(float_url: str, bytes_folder: Path) -> None:
    tokens = [5, 6, 7, 8]
    [choice] = complete(float_url, prompt=tokens, prompt_logprobs=3)["choices"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None and choice["logprobs"] is None
    for found, row, token in zip(rest, directly(bytes_folder, tokens), tokens[1:], strict=True):
        for name, entry in found.items():
            assert entry["logprob"] == pytest.approx(float(row[int(name)]), abs=1e-3)
            assert entry["rank"] == int((row > row[int(name)]).sum()) + 1
        assert str(token) in found and {1, 2, 3} <= {entry["rank"] for entry in found.values()}


def test_a_stream_tells_the_same(float_url: str) -> None:
    more: dict[str, Any] = {"echo": True, "logprobs": 1, "prompt_logprobs": 0, "n": 2}
    whole = complete(float_url, **more)["choices"]
    told = httpx.post(f"{float_url}/v1/completions", json={**ASK, **more, "stream": True}, timeout=60).text
    chunks = [json.loads(line[6:]) for line in told.splitlines() if line.startswith("data: {")]
    for i, expected in enumerate(whole):
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == i]
        assert "".join(choice["text"] for choice in mine) == expected["text"]
        for column, values in expected["logprobs"].items():
            assert [v for choice in mine if choice["logprobs"] for v in choice["logprobs"][column]] == values
        assert [c["prompt_logprobs"] for c in mine if "prompt_logprobs" in c] == [expected["prompt_logprobs"]]


def test_more_than_can_be_named_is_refused(float_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rapid.prompt_logprobs.MAX_LOGPROBS", 100)
    answer = httpx.post(f"{float_url}/v1/completions", json={**ASK, "echo": True, "logprobs": 5}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logprobs")
    too_long = {**ASK, "prompt": [5] * 8193, "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = httpx.post(f"{float_url}/v1/completions", json=too_long, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
