"""What is told of requests to engines in this process: a line in the log of each, and spans."""

from __future__ import annotations

import json
import logging
import queue
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from ray._common.formatters import JSONFormatter
from served import JSON_TYPE, LETTERS, complete, local_api, pieces, seconds_until_free

from deployments.observability.metrics import RequestMetrics
from rapid.events import Statistics

Lines = queue.Queue[dict[str, Any]]  # a request is logged when its answer has gone out
BODY = {"model": "letters", "prompt": "abcabcab", "max_tokens": 5, "temperature": 0}


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> InMemorySpanExporter:
    exporter.clear()
    return exporter


@pytest.fixture
def lines() -> Iterator[Lines]:
    """The log's lines as Ray Serve writes them when they are to be JSON."""
    written: Lines = queue.Queue()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.put(json.loads(JSONFormatter().format(record)))

    logger, handler = logging.getLogger("ray.serve"), Handler()
    logger.addHandler(handler)
    yield written
    logger.removeHandler(handler)


def post(url: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=BODY | fields, headers={"X-Request-Id": "mine"}, timeout=30)


def test_a_request_is_one_line_without_its_text(letters_url: str, lines: Lines) -> None:
    answer = post(letters_url)
    assert answer.headers["x-request-id"] == "mine"
    line = lines.get(timeout=10)
    asked = {"request_id": "mine", "endpoint": "/v1/completions", "status": 200, "error": None, "stream": False}
    told = {"strategy": "rapid", "emitted": 5, "finish_reason": "length", "fallback": "no_long_context"}
    assert line.items() >= (asked | told).items()
    assert 0 < line["first_token_ms"] / 1e3 <= line["duration_s"]
    assert {"rounds", "drafted", "accepted", "prompt_tokens", "timings_ms"} <= line.keys()
    assert not any(text in json.dumps(line) for text in (BODY["prompt"], answer.json()["choices"][0]["text"]))


def test_what_several_choices_did_is_one_line(letters_url: str, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Statistics] = []
    monkeypatch.setattr(RequestMetrics, "read", lambda _, statistics: counted.append(statistics))
    each = [choice["rapid"] for choice in post(letters_url, n=3, max_tokens=7).json()["choices"]]
    line = lines.get(timeout=10)
    for field in ("rounds", "emitted", "drafted", "accepted"):
        assert line[field] == sum(choice[field] for choice in each)
    assert line["emitted"] == 21 and line["finish_reason"] == "length,length,length"
    assert line["prompt_tokens"] == each[0]["prompt_tokens"] == counted[0].prompt_tokens and len(counted) == 1


def test_a_user_is_told_apart_and_not_named(letters_url: str, lines: Lines) -> None:
    for user in ("ann@example.org", "ann@example.org", "bob@example.org", None):
        post(letters_url, user=user)
    told = [lines.get(timeout=10) for _ in range(4)]
    assert told[0]["user"] == told[1]["user"] != told[2]["user"] and told[3]["user"] is None
    assert "example.org" not in json.dumps(told)


def test_a_nameless_request_is_given_a_name(letters_url: str, lines: Lines) -> None:
    name = httpx.post(f"{letters_url}/v1/completions", json=BODY).headers["x-request-id"]
    assert len(name) == 32 and lines.get(timeout=10)["request_id"] == name


@pytest.mark.parametrize(
    ("fields", "status", "error"),
    [
        ({"n": 0}, 400, "invalid_request"),
        ({"model": "other"}, 404, "model_not_found"),
        ({"max_tokens": 9000}, 400, "context_length_exceeded"),
        ({"temperature": -1}, 400, "invalid_request"),
    ],
    ids=["field", "model", "length", "value"],
)
def test_a_refused_request_is_a_line_too(
    letters_url: str, lines: Lines, fields: dict[str, Any], status: int, error: str
) -> None:
    assert post(letters_url, **fields).status_code == status
    line = lines.get(timeout=10)
    assert (line["status"], line["error"], line["request_id"]) == (status, error, "mine")


def test_who_leaves_is_told_as_such(letters_url: str, lines: Lines) -> None:
    answer = pieces(letters_url, {"strategy": "autoregressive"}, num_tokens=4000)
    next(answer)
    answer.close()
    seconds_until_free(letters_url)
    line = lines.get(timeout=10)
    assert line["status"] == 499 and 0 < line["emitted"] < 4000


def test_texts_are_written_where_that_is_asked_for(tiny_folder: Path, lines: Lines) -> None:
    engine = {"model": str(tiny_folder), "kv_memory_gib": 0.1, "threads": 1}
    config = {"served_model": "letters", "target": engine, "colocated": True, "observability": {"log_prompts": True}}
    with local_api(config) as url:
        answer = post(url)
    line = lines.get(timeout=10)
    assert (line["prompt"], line["answer"]) == (BODY["prompt"], answer.json()["choices"][0]["text"])


def test_spans_say_where_the_time_went(letters_url: str, spans: InMemorySpanExporter) -> None:
    _, statistics = complete(letters_url, {"strategy": "speculative", "num_draft_tokens": 3})
    by_name: dict[str, list[ReadableSpan]] = {}
    ours = [span for span in spans.get_finished_spans() if (span.instrumentation_scope or span).name == "rapid"]
    for span in ours:
        by_name.setdefault(span.name, []).append(span)
    (root,) = by_name["generate"]
    assert root.attributes is not None and root.attributes["gen_ai.usage.output_tokens"] == statistics["emitted"]
    assert {name: len(many) for name, many in by_name.items()} == {
        "generate": 1,
        "retrieve": 1,
        "queue": 2,
        "prefill": 2,
        "draft": sum(1 for span in by_name["verify"] if (span.attributes or {})["rapid.drafted"]),
        "verify": statistics["rounds"],
    }
    for name in ("drafted", "accepted"):
        assert sum((span.attributes or {})[f"rapid.{name}"] for span in by_name["verify"]) == statistics[name]
    for span in ours:
        if span is not root:
            assert span.parent == root.get_span_context()
            assert root.start_time <= span.start_time <= span.end_time <= root.end_time  # type: ignore[operator]
    assert LETTERS[:15] not in str([span.to_json() for span in ours])


def test_two_hundred_who_leave_at_once_hold_nothing_two_seconds_later(letters_url: str) -> None:
    plain = {"strategy": "autoregressive"}  # a retriever in a thread is not cancelled; one on Ray, see there
    body = json.dumps(BODY | {"prompt": LETTERS, "max_tokens": 4000, "stream": True, "rapid": plain}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{JSON_TYPE}Content-Length: {len(body)}\r\n\r\n"

    def leave(index: int) -> None:
        with socket.create_connection(("127.0.0.1", int(letters_url.rpartition(":")[2]))) as connection:
            connection.sendall(head.encode() + body)
            if index % 2:
                connection.recv(1)  # half of them leave before any answer

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(leave, range(200)))
    assert seconds_until_free(letters_url) < 2.0
