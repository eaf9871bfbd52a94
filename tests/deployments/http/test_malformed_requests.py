"""Thousands of requests that are wrong are for `make fuzz`; a few hundred of the same are here."""

from __future__ import annotations

import asyncio
import json
import tracemalloc

import httpx
import pytest
from served import seconds_until_free

from benchmarks.common.malformed import Attack, Attacker, Outcome, logged_errors, strike


# What a form that is cut short held in memory, Starlette leaves to the garbage collector.
@pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile:pytest.PytestUnraisableExceptionWarning")
def test_malformed_requests_are_refused_in_words_and_leave_nothing_behind(letters_url: str) -> None:
    attacker = Attacker(httpx.get(f"{letters_url}/openapi.json").json(), "letters", seed=7)
    with logged_errors() as logged:
        outcome = asyncio.run(strike(letters_url, attacker.attacks(450)))
        seconds_until_free(letters_url)
    assert (outcome.problems, logged) == ([], [])
    assert sum(statuses.total() for statuses in outcome.statuses.values()) == 450
    assert {status for statuses in outcome.statuses.values() for status in statuses} >= {"200", "400", "404", "405"}


def test_a_number_takes_no_memory_before_it_is_refused(letters_url: str) -> None:
    tracemalloc.start()
    try:
        for field in ("n", "best_of", "logprobs", "top_k", "min_tokens"):
            body = {"model": "letters", "prompt": "abc", "max_tokens": 1, field: 1_000_000}
            assert httpx.post(f"{letters_url}/v1/completions", json=body).status_code in (200, 400)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_forms_and_queries_are_attacked_and_what_is_only_slow_is_whole(letters_url: str) -> None:
    described = httpx.get(f"{letters_url}/openapi.json").json()
    attacks = list(Attacker(described, "letters", seed=7).attacks(1600))
    uploads = [attack for attack in attacks if attack.content_type == "multipart/form-data; boundary=x"]
    assert {attack.kind for attack in uploads} >= {"wrong value", "unknown field", "truncated", "giant string", "slow"}
    asked = {attack.path.partition("=")[0] for attack in attacks if attack.kind == "wrong query"}
    files = {f"/v1/files?{name}" for name in ("limit", "order", "after", "purpose")}
    assert asked == files | {"/v1/batches?limit", "/v1/batches?after"}
    for attack in attacks:
        if attack.kind in ("slow", "wrong content type"):
            body = b"".join(attack.pieces)
            assert body.endswith(b"--x--\r\n") or isinstance(json.loads(body), dict)
    assert not any("{" in attack.path for attack in attacks)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (None, "no answer in time"),
        (b"", "closed without an answer"),
        (b"HTTP/1.1 500 Oh\r\n\r\n", "500"),
        (b"HTTP/1.1 503 Oh\r\n\r\n", "503"),
        (b'HTTP/1.1 422 No\r\n\r\n{"detail": []}', "not an error object"),
        (b"HTTP/1.1 200 OK\r\n\r\nevent: error\ndata: {code: internal_error}", "internal error"),
    ],
)
def test_what_should_not_have_been_is_noticed(answer: bytes | None, problem: str) -> None:
    outcome = Outcome()
    outcome.note(Attack("truncated", "POST", "/", "application/json", [b"{"]), answer)
    assert [problem in found for found in outcome.problems] == [True]


def test_every_body_and_error_is_described(letters_url: str) -> None:
    described = httpx.get(f"{letters_url}/openapi.json").json()
    chat = described["paths"]["/v1/chat/completions"]["post"]
    body = chat["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "model", "rapid", "stream"} <= body["properties"].keys()
    assert chat["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}
    assert chat["responses"].keys() >= {"4XX", "503"}
    files = described["paths"]["/v1/files"]
    assert files["post"]["requestBody"]["content"].keys() == {"multipart/form-data"}
    assert {it["name"] for it in files["get"]["parameters"]} == {"limit", "order", "after", "purpose"}
    names = set(str(described).split("#/components/schemas/")[1:])
    assert {name.partition("'")[0] for name in names} <= described["components"]["schemas"].keys()
