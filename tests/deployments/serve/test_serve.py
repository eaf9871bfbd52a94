"""The whole application on Ray Serve, over HTTP, with real weights in float32: one cluster for the module."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from openai import BadRequestError, NotFoundError, OpenAI
from served import (
    JSON_TYPE,
    MODEL,
    ON_RAY,
    QUESTION,
    chat,
    document,
    embedded,
    engine_of,
    health,
    seconds_until_free,
    served,
)

from cluster.processes import ENVIRONMENT

pytestmark = ON_RAY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served") / "files"


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    # A float32 pass takes twice as long as the default bfloat16 one, so it is given half as many tokens.
    engine = {"model": MODEL, "dtype": "float32", "max_batch_tokens": 64, "kv_memory_gib": 1}
    engine |= {"max_sequences": 4, "max_queued": 4}
    options = {"chunk_tokens": 64, "min_tokens": 192, "threshold": 0.1}
    retriever = {"long_content_tokens": 256, "options": options}
    files = {"folder": str(folder)}
    with served({"target": engine, "drafter": engine, "retriever": retriever, "files": files}) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize(
    "rapid", [{"strategy": "autoregressive"}, {"num_draft_tokens": "auto"}, {"num_draft_tokens": 10}]
)
def test_greedy_over_ray_is_transformers_greedy(client: OpenAI, expected: str, rapid: dict[str, Any]) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=chat(), max_tokens=24, temperature=0, extra_body={"rapid": rapid}
    )
    assert answer.choices[0].message.content == expected
    statistics = answer.model_extra["rapid"]  # type: ignore[index]
    if rapid.get("num_draft_tokens") == 10:  # then the first round waits for the drafter
        assert statistics["rounds"] < 24 and statistics["accepted"] and statistics["timings_ms"]["drafting"]


def test_a_stream_says_the_same_and_ends_as_openais_does(client: OpenAI, url: str, expected: str) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": chat(), "max_tokens": 24, "temperature": 0, "stream": True}
    chunks = list(client.chat.completions.create(**options, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + 24
    assert chunks[-1].model_extra["rapid"]["emitted"] == 24
    assert sum("rapid" in (chunk.model_extra or {}) for chunk in chunks) == 1

    with httpx.stream("POST", f"{url}/v1/chat/completions", json=options, timeout=120) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert "rapid" in json.loads(lines[-2].removeprefix("data: "))


def test_the_next_question_about_a_document_finds_it_read(client: OpenAI) -> None:
    rapid = {"strategy": "autoregressive"}
    for question in (QUESTION, "Where does this happen?"):
        answer = client.chat.completions.create(
            model=MODEL, messages=chat(5, question), max_tokens=2, temperature=0, extra_body={"rapid": rapid}
        )
    usage = answer.usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert usage.prompt_tokens / 2 < (usage.prompt_tokens_details.cached_tokens or 0) < usage.prompt_tokens


def test_leaving_mid_stream_frees_everything_within_a_second(client: OpenAI, url: str) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=chat(), max_tokens=400, stream=True, temperature=0)
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    deadline = time.monotonic() + 30
    while not all(health(url)["sequences"].values()):  # the drafter joins in the background
        assert time.monotonic() < deadline
    stream.close()
    assert seconds_until_free(url) < 1.0


def test_leaving_during_prefill_frees_everything_within_a_second(url: str) -> None:
    content = f"{document(0, 24_000)}\n\n{QUESTION}"
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": content}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{JSON_TYPE}Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + body)
        deadline = time.monotonic() + 60
        while not health(url)["sequences"]["target"]:
            assert time.monotonic() < deadline
    assert seconds_until_free(url) < 1.0


def test_four_requests_at_once_answer_as_each_does_alone(client: OpenAI) -> None:
    def ask(index: int) -> tuple[str | None, Any]:
        options: dict[str, Any] = {"max_tokens": 16, "temperature": 0, "extra_body": {"rapid": {"num_draft_tokens": 4}}}
        answer = client.chat.completions.create(model=MODEL, messages=chat(index), **options)
        return answer.choices[0].message.content, answer.model_extra["rapid"]["chunks"]  # type: ignore[index]

    alone = [ask(index) for index in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(ask, range(4)))
    assert together == alone
    assert len({text for text, _ in alone}) == 4


def test_a_full_queue_is_answered_429_and_the_rest_are_served(url: str) -> None:
    def body(max_tokens: int, stream: bool) -> dict[str, Any]:
        plain = {"strategy": "autoregressive"}
        numbers = {"model": MODEL, "prompt": "1, 2, 3, 4, 5,", "temperature": 0}
        return numbers | {"max_tokens": max_tokens, "stream": stream, "rapid": plain}

    with ThreadPoolExecutor(8) as pool, ExitStack() as places:
        held = []  # these take all places; a response lives as long as the iterator over it
        for _ in range(4):
            stream = httpx.stream("POST", f"{url}/v1/completions", json=body(4000, True), timeout=60)
            held.append(places.enter_context(stream).iter_lines())
            next(held[-1])
        waiting = [pool.submit(httpx.post, f"{url}/v1/completions", json=body(4, False), timeout=60) for _ in range(8)]
        refused = next(future.result() for future in as_completed(waiting))  # nothing can be served yet
        assert refused.status_code == 429 and refused.headers["retry-after"]
        assert refused.json()["error"]["type"] == "rate_limit_error"
        places.close()
        answers = [future.result().status_code for future in waiting]
    assert set(answers) == {200, 429}
    assert seconds_until_free(url) < 1.0


def test_a_file_goes_through_all_processes(client: OpenAI, folder: Path) -> None:
    text = document(7).encode()

    def uploaded() -> str:
        file = client.files.create(file=("passage.txt", text), purpose="user_data")
        assert embedded(client, file.id).status == "processed"
        return file.id

    def warmed(file_id: str) -> dict[str, int]:
        return client.post(f"/files/{file_id}/warm", cast_to=dict)

    file_id = uploaded()
    assert list(folder.glob("vectors/*.npz")) and client.files.content(file_id).read() == text
    num_warmed = warmed(file_id)["prompt_tokens"]
    parts: list[Any] = [{"type": "file", "file": {"file_id": file_id}}, {"type": "text", "text": QUESTION}]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": parts}],
        max_tokens=2,
        extra_body={"rapid": {"strategy": "autoregressive"}},
    )
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens_details.cached_tokens or 0) >= num_warmed - 16 > 200
    assert client.files.delete(file_id).deleted
    assert not [path for path in folder.rglob("*") if path.is_file() and path.name not in ("lock", "kept.sqlite")]
    page = client.files.create(file=("a.html", b"<html><p>abc"), purpose="user_data")  # read in a process of its own
    assert client.files.delete(page.id).deleted
    again = uploaded()
    assert warmed(again)["cached_tokens"] < 64  # the engine had forgotten all but the template's beginning
    client.files.delete(again)


def test_a_file_in_parts_goes_through_all_processes(client: OpenAI) -> None:
    text = document(8).encode()
    upload = client.uploads.upload_file_chunked(
        file=text, filename="a.txt", bytes=len(text), mime_type="text/plain", purpose="user_data", part_size=500
    )
    assert upload.file is not None and client.files.content(upload.file.id).read() == text
    with pytest.raises(BadRequestError, match="is completed"):
        client.uploads.cancel(upload.id)
    with pytest.raises(NotFoundError):
        client.uploads.parts.create("upload_" + "0" * 32, data=b"abc")
    client.files.delete(upload.file.id)


def test_documents_are_ranked_by_the_retriever(url: str) -> None:
    body = {"model": MODEL, "query": "Who counts the birds?", "return_documents": True}
    documents = ["Interest rates rose again.", "Ann counts the birds every morning.", "The cat sat on the mat."]
    answer = httpx.post(f"{url}/v1/rerank", json={**body, "documents": documents, "top_n": 2}, timeout=60)
    assert answer.status_code == 200, answer.text
    first, second = answer.json()["results"]
    assert (first["index"], first["document"]) == (1, {"text": documents[1]})
    # By cosine, which the vectors that the same retriever gives out have too.
    embedded = httpx.post(f"{url}/v1/embeddings", json={"model": MODEL, "input": [body["query"], *documents]}).json()
    query, *vectors = (row["embedding"] for row in embedded["data"])
    cosines = [sum(a * b for a, b in zip(query, vector, strict=True)) for vector in vectors]
    ranked = sorted(range(3), key=lambda i: -cosines[i])[:2]
    assert [first["index"], second["index"]] == ranked
    assert [first["relevance_score"], second["relevance_score"]] == pytest.approx(
        [cosines[i] for i in ranked], abs=1e-4
    )


def test_models_and_health(client: OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    state = health(url)
    assert state["status"] == "ok" and state["models"] == {"target": MODEL, "drafter": MODEL}


def test_ray_lets_its_processes_stand_as_far_behind_as_is_said(url: str) -> None:
    kinds = ("ray::EngineActor", "ray::ServeReplica", "ray::ProxyActor", "ray::ServeController")
    parts = [each for each in psutil.Process().children(recursive=True) if " ".join(each.cmdline()).startswith(kinds)]
    assert len(parts) >= 8
    own, behind = psutil.Process().nice(), int(ENVIRONMENT["RAY_worker_niceness"])
    assert {part.nice() for part in parts} == {min(19, own + behind)}


def streamed(client: OpenAI, kill: str | None = None) -> tuple[str, dict[str, Any]]:
    """A greedy answer and its `rapid` object; the engine of ``kill`` dies after the third piece."""
    options = {"max_tokens": 24, "temperature": 0, "extra_body": {"rapid": {"num_draft_tokens": 2}}}
    pieces, rapid = [], {}
    for chunk in client.chat.completions.create(model=MODEL, messages=chat(), stream=True, **options):  # type: ignore[call-overload]
        pieces += [choice.delta.content or "" for choice in chunk.choices]
        rapid = (chunk.model_extra or {}).get("rapid", rapid)
        if kill and len(pieces) == 3:
            ray.kill(engine_of(kill))
    return "".join(pieces), rapid


def wait_until_whole(url: str) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            if set(health(url)["sequences"]) == {"target", "drafter"}:
                return
        except KeyError:  # an error instead
            assert time.monotonic() < deadline


@pytest.mark.parametrize("killed", ["Target", "Drafter"])
def test_an_answer_survives_its_engine(client: OpenAI, url: str, killed: str) -> None:
    expected, _ = streamed(client)
    text, rapid = streamed(client, kill=killed)
    assert text == expected
    assert rapid["emitted"] == 24
    assert (rapid["resumed"], rapid["drafters_lost"]) == ((1, 0) if killed == "Target" else (0, 1))
    wait_until_whole(url)
