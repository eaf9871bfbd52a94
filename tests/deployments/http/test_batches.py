"""Batches through the API: the answers are those of the same requests alone, and every fault of the input is named."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from openai.types import Batch
from served import local_api

from deployments.http import batch_runner

MESSAGES = [{"role": "user", "content": "abcab"}]
CHAT = {"model": "bytes", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
TEXT = {"model": "bytes", "prompt": "abcab", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module", autouse=True)
def looks_often() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(batch_runner, "BEAT_S", 0.02)
        yield


@pytest.fixture(scope="module")
def exact_url(bytes_folder: Path) -> Iterator[str]:
    """The API over a random model, in float32: its answers do not depend on what is computed beside them."""
    engine = {"model": str(bytes_folder), "dtype": "float32", "kv_memory_gib": 0.1, "threads": 1}
    with local_api({"served_model": "bytes", "target": engine, "drafter": engine}) as url:
        yield url


@pytest.fixture(scope="module")
def keys_url(bytes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API for the keys a and b, and room for few files."""
    engine = {"model": str(bytes_folder), "dtype": "float32", "kv_memory_gib": 0.1, "threads": 1}
    files = {"folder": str(tmp_path_factory.mktemp("keys")), "max_stored_mb": 0.05}
    config = {"served_model": "bytes", "target": engine, "drafter": engine, "files": files}
    with local_api({**config, "access": {"api_keys": ["a", "b"]}}) as url:
        yield url


def client(url: str, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def lines(url: str, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"custom_id": f"ask-{i}", "method": "POST", "url": url, "body": body} for i, body in enumerate(bodies)]


def upload(openai: OpenAI, asked: list[Any], ending: str = "") -> str:
    data = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in asked) + ending
    return openai.files.create(file=("asked.jsonl", data.encode()), purpose="batch").id


def create(openai: OpenAI, asked: list[Any], endpoint: Any, **more: Any) -> Batch:
    return openai.batches.create(
        input_file_id=upload(openai, asked), endpoint=endpoint, completion_window="24h", **more
    )


def ended(openai: OpenAI, batch: Batch) -> Batch:
    while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
        time.sleep(0.02)
        batch = openai.batches.retrieve(batch.id)
    return batch


def output(openai: OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """The lines of an output file by their `custom_id`."""
    assert file_id is not None
    told = [json.loads(line) for line in openai.files.content(file_id).text.splitlines()]
    assert len({line["custom_id"] for line in told}) == len(told)
    return {line["custom_id"]: line for line in told}


def said(body: dict[str, Any]) -> list[Any]:
    """What an answer says, without names and times."""
    choices = [
        [choice.get("text"), choice.get("message"), choice["finish_reason"]] for choice in body.get("choices", [])
    ]
    texts = [part["text"] for item in body.get("output", []) for part in item["content"]]
    return [*choices, *texts, *body.get("data", [])]


@pytest.mark.parametrize(
    ("endpoint", "bodies"),
    [
        ("/v1/chat/completions", [CHAT, CHAT | {"max_tokens": 3}, CHAT | {"rapid": {"strategy": "lookup"}}]),
        ("/v1/completions", [TEXT, TEXT | {"prompt": ["ab", "ba"]}]),
        ("/v1/embeddings", [{"model": "bytes", "input": "some text"}]),
        ("/v1/responses", [{"model": "bytes", "input": "abcab", "max_output_tokens": 8, "temperature": 0}]),
    ],
)
def test_answers_are_those_of_the_requests_alone(exact_url: str, endpoint: str, bodies: list[dict[str, Any]]) -> None:
    openai = client(exact_url)
    made = create(openai, lines(endpoint, bodies), endpoint, metadata={"run": "night"})
    assert made.status == "validating" and made.metadata == {"run": "night"} and made.expires_at
    batch = ended(openai, made)
    assert (batch.status, batch.error_file_id, batch.errors) == ("completed", None, None)
    assert batch.request_counts is not None and batch.usage is not None
    assert batch.request_counts.model_dump() == {"total": len(bodies), "completed": len(bodies), "failed": 0}
    assert batch.in_progress_at and batch.finalizing_at and batch.completed_at
    answers, num_tokens = output(openai, batch.output_file_id), 0
    for i, body in enumerate(bodies):
        response = answers[f"ask-{i}"]["response"]
        alone = httpx.post(exact_url + endpoint, json=body, timeout=60).json()
        assert response["status_code"] == 200 and response["request_id"] and answers[f"ask-{i}"]["error"] is None
        assert said(response["body"]) == said(alone) != []
        num_tokens += alone["usage"]["total_tokens"]
    assert batch.usage.total_tokens == num_tokens


def test_a_wrong_request_fails_alone(exact_url: str) -> None:
    openai = client(exact_url)
    wrong = [CHAT | {"temperature": 11}, CHAT | {"model": "gpt"}, {}]
    batch = ended(openai, create(openai, lines("/v1/chat/completions", [CHAT, *wrong]), "/v1/chat/completions"))
    assert batch.status == "completed" and batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 4, "completed": 1, "failed": 3}
    assert list(output(openai, batch.output_file_id)) == ["ask-0"]
    failed = output(openai, batch.error_file_id)
    assert [failed[f"ask-{i}"]["response"]["status_code"] for i in (1, 2, 3)] == [400, 404, 400]
    assert failed["ask-1"]["response"]["body"]["error"]["param"] == "temperature"


GOOD = lines("/v1/completions", [TEXT])[0]


@pytest.mark.parametrize(
    ("asked", "code", "param", "line"),
    [
        ([], "empty_file", None, None),
        (["{"], "invalid_json_line", None, 1),
        ([GOOD, GOOD | {"custom_id": "b", "url": "/v1/embeddings"}], "mismatched_url", "url", 2),
        ([GOOD, "", GOOD], "duplicate_custom_id", "custom_id", 3),
        ([GOOD | {"method": "GET"}], "invalid_line", "method", 1),
        ([GOOD | {"colour": 1}], "invalid_line", "colour", 1),
        ([GOOD | {"body": TEXT | {"stream": True}}], "invalid_line", "body.stream", 1),
        (["[]"], "invalid_line", None, 1),
        (["\xff\x00"], "invalid_json_line", None, 1),
    ],
)
def test_faults_of_the_input_are_named(exact_url: str, asked: list[Any], code: str, param: Any, line: Any) -> None:
    openai = client(exact_url)
    batch = ended(openai, create(openai, asked or [""], "/v1/completions"))
    assert batch.status == "failed" and batch.failed_at and batch.output_file_id is None and batch.errors
    [error] = batch.errors.data or []
    assert (error.code, error.param, error.line) == (code, param, line) and error.message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
        ({"priority": 1}, "priority"),
    ],
)
def test_a_wrong_batch_is_refused(exact_url: str, body: dict[str, Any], param: str) -> None:
    asked = {"input_file_id": "", "endpoint": "/v1/completions", "completion_window": "24h"}
    asked["input_file_id"] = upload(client(exact_url), [GOOD])
    answer = httpx.post(f"{exact_url}/v1/batches", json=asked | body)
    assert answer.status_code in (400, 404) and answer.json()["error"]["param"] == param


def test_files_of_batches_are_no_documents(exact_url: str) -> None:
    openai = client(exact_url)
    file_id = upload(openai, [GOOD])
    part = {"type": "file", "file": {"file_id": file_id}}
    asked = {"model": "bytes", "messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
    answer = httpx.post(f"{exact_url}/v1/chat/completions", json=asked)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages.0.content.0.file.file_id"
    assert httpx.post(f"{exact_url}/v1/files/{file_id}/warm").status_code == 400
    with pytest.raises(Exception, match="user_data"):
        openai.files.create(file=("x", b"x"), purpose="batch_output")  # type: ignore[arg-type]
    text = openai.files.create(file=("asked.jsonl", json.dumps(GOOD).encode()), purpose="user_data").id
    answer = httpx.post(
        f"{exact_url}/v1/batches",
        json={"input_file_id": text, "endpoint": "/v1/completions", "completion_window": "24h"},
    )
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "input_file_id"
    openai.files.delete(file_id)  # has the same bytes, and leaves the document alone
    assert openai.files.content(text).text == json.dumps(GOOD)
    assert (openai.files.retrieve(text).model_extra or {})["rapid"]["tokens"] > 0
    asked["messages"][0]["content"][0]["file"]["file_id"] = text
    assert httpx.post(f"{exact_url}/v1/chat/completions", json=asked, timeout=60).status_code == 200


def test_a_batch_belongs_to_its_key(keys_url: str) -> None:
    a, b = client(keys_url, "a"), client(keys_url, "b")
    batch = ended(a, create(a, lines("/v1/completions", [TEXT]), "/v1/completions"))
    assert batch.status == "completed" and output(a, batch.output_file_id)["ask-0"]["response"]["status_code"] == 200
    assert [each.id for each in a.batches.list()] == [batch.id] and list(b.batches.list()) == []
    headers = {"Authorization": "Bearer b"}
    for method, path in (("GET", batch.id), ("POST", f"{batch.id}/cancel"), ("GET", "batch_..%2F..%2Fx")):
        answer = httpx.request(method, f"{keys_url}/v1/batches/{path}", headers=headers)
        assert answer.status_code == 404
    answer = httpx.post(
        f"{keys_url}/v1/batches",
        headers=headers,
        json={"input_file_id": batch.input_file_id, "endpoint": "/v1/completions", "completion_window": "24h"},
    )
    assert answer.status_code == 404
    with pytest.raises(Exception, match="completed already"):
        a.batches.cancel(batch.id)


def test_answers_that_have_no_room_end_the_batch(keys_url: str) -> None:
    openai = client(keys_url, "b")
    asked = lines("/v1/completions", [TEXT | {"max_tokens": 20, "logprobs": 5}] * 60)
    batch = ended(openai, create(openai, asked, "/v1/completions"))
    assert batch.status == "failed" and batch.errors and batch.request_counts
    assert [error.code for error in batch.errors.data or []] == ["storage_limit_exceeded"]
    assert 0 < len(output(openai, batch.output_file_id)) == batch.request_counts.completed < 60


def test_batches_are_listed_in_pages_and_cancelled(exact_url: str) -> None:
    openai = client(exact_url)
    before = [batch.id for batch in openai.batches.list()]
    long = create(openai, lines("/v1/completions", [TEXT | {"max_tokens": 64}] * 3000), "/v1/completions")
    waits = create(openai, lines("/v1/completions", [TEXT]), "/v1/completions")  # one of a key at a time
    assert [batch.id for batch in openai.batches.list(limit=1)] == [waits.id, long.id, *before]
    while not (counts := openai.batches.retrieve(long.id).request_counts) or counts.completed < 2:
        time.sleep(0.02)
    assert openai.batches.cancel(long.id).status == "cancelling"
    batch = ended(openai, long)
    assert batch.status == "cancelled" and batch.cancelled_at and batch.request_counts is not None
    assert 2 <= batch.request_counts.completed < 3000
    assert len(output(openai, batch.output_file_id)) == batch.request_counts.completed
    assert ended(openai, waits).status == "completed"
