"""The application as the tests serve it, what they ask it, and how they look at it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import uvicorn
from openai import OpenAI
from ray import serve

from cluster.processes import ENVIRONMENT
from deployments.app import build
from deployments.builders import local_backend
from deployments.config import parse_config
from deployments.http.api import make_api
from deployments.serve.engines import engines_of
from deployments.service import LocalService
from rapid.text.tokenizer import load_tokenizer

MODEL = "smollm2-135m-instruct"
JSON_TYPE = "Content-Type: application/json\r\n"
QUESTION = "Who is speaking, and what does he want?"

# Ray leaves sockets and pipes to the garbage collector, and its own code uses what its dependencies deprecate.
ON_RAY = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def served(
    config: dict[str, Any], *, logging_config: dict[str, Any] | None = None, **ray_options: Any
) -> Iterator[str]:
    """The application of ``config`` on a Ray of its own; yields its URL."""
    port = free_port()
    os.environ.update(ENVIRONMENT)  # Serve's controller inherits it
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, **ray_options)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(parse_config(config)), name="rapid", route_prefix="/", logging_config=logging_config)
        yield f"http://127.0.0.1:{port}"
    finally:
        ray.shutdown()  # which ends Serve too, and does not wait for its replicas to drain


@contextmanager
def local_api(config: dict[str, Any]) -> Iterator[str]:
    """The API of ``config`` over engines in this process, without Ray; yields its URL."""
    settings = parse_config(config)
    with local_backend(settings) as backend:
        service = LocalService(settings, backend, load_tokenizer(settings.target.model))
        quiet = {"log_level": "error", "lifespan": "off"}
        server = uvicorn.Server(
            uvicorn.Config(make_api(settings, service), port=0, timeout_graceful_shutdown=5, **quiet)
        )
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()  # from now on clients wait for the server, and are not turned away
            thread = threading.Thread(target=server.run, args=([listener],))
            thread.start()
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                server.should_exit = True
                thread.join()
                # FastAPI remembers the routes of every application for ever, and with them what they close over.
                backend._engines.clear()


def document(index: int, characters: int = 1600) -> str:
    """A passage of a novel where the shared texts are at hand, else of a short tale with numbered sentences behind."""
    novel = Path(__file__).parents[3] / "shared" / "data" / "moby-dick.txt"
    if novel.exists():
        start = 30_000 + index * 40_000
        return novel.read_text(encoding="utf-8")[start : start + characters]
    tale = (Path(__file__).parents[1] / "data" / "ferry.txt").read_text(encoding="utf-8")
    sentences = (f"In room {n} of house {index} lives a person who counts {n * 7} birds.\n" for n in range(1000))
    return (tale[index * 500 :] + "".join(sentences))[:characters]


def chat(index: int = 0, question: str = QUESTION) -> list[Any]:
    return [{"role": "user", "content": f"{document(index)}\n\n{question}"}]


LETTERS = "abcab bcacb aabca\n" * 40 + "\nabca b"


def pieces(
    url: str, rapid: dict[str, Any], num_tokens: int = 24, prompt: str = LETTERS
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The greedy answer of a model of letters as it comes; with the last piece comes its `rapid` object."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    options: dict[str, Any] = {"max_tokens": num_tokens, "temperature": 0, "stream": True}
    model = client.models.list().data[0].id
    for chunk in client.completions.create(model=model, prompt=prompt, extra_body={"rapid": rapid}, **options):
        yield "".join(choice.text for choice in chunk.choices), (chunk.model_extra or {}).get("rapid") or {}


def complete(
    url: str, rapid: dict[str, Any], num_tokens: int = 24, prompt: str = LETTERS
) -> tuple[str, dict[str, Any]]:
    """All of such an answer, and its `rapid` object."""
    *texts, (last, statistics) = pieces(url, rapid, num_tokens, prompt)
    text = "".join(text for text, _ in texts) + last
    assert len(text) == statistics["emitted"] == num_tokens
    return text, statistics


def engines_named(deployment: str) -> list[Any]:
    """The handles of its engines' actors."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    mine = engines_of("rapid", deployment)
    return [ray.get_actor(**actor) for actor in actors if actor["name"].startswith(mine)]


def engine_of(deployment: str) -> Any:
    """The handle of the actor of its only engine."""
    [engine] = engines_named(deployment)
    return engine


def health(url: str) -> dict[str, Any]:
    time.sleep(0.02)  # asking without a pause takes the cores from what is asked about
    body: dict[str, Any] = httpx.get(f"{url}/health", timeout=120).json()
    return body


def seconds_until_free(url: str, limit: float = 10.0) -> float:
    """How long until no engine holds a sequence or a byte of KV."""
    started = time.monotonic()
    while time.monotonic() - started < limit:
        state = health(url)
        if not any(state["sequences"].values()) and not any(state["kv_bytes"].values()):
            return time.monotonic() - started
    raise AssertionError(f"still held after {limit} s: {state}")


def embedded(client: OpenAI, file_id: str) -> Any:
    """The file once its vectors are there."""
    deadline = time.monotonic() + 60
    while (file := client.files.retrieve(file_id)).status == "processing":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return file
