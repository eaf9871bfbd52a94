"""What retrieval stands on is killed while requests run: they go on without drafts, which come back with it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from served import ON_RAY, complete, pieces, served

pytestmark = ON_RAY

DOUBLE = Path(__file__).parents[2] / "retrieval" / "qdrant_double.py"
STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "speculative", "num_draft_tokens": 3},
    {"strategy": "speculative", "num_draft_tokens": 3, "retrieval": {"keep": True}},
    {"strategy": "rapid", "num_draft_tokens": 3},  # a γ that is chosen would not wait for the drafter
    {"strategy": "rag"},
]


class Qdrant:
    """A server in a process of its own, with nothing in it whenever it starts."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen([sys.executable, str(DOUBLE), str(self.port)])
        deadline = time.monotonic() + 60
        while True:
            try:
                return socket.create_connection(("127.0.0.1", self.port)).close()
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def qdrant() -> Iterator[Qdrant]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("QDRANT_API_KEY", "open sesame")  # the configuration has none
        qdrant = Qdrant()
        yield qdrant
        qdrant.kill()


@pytest.fixture(scope="module")
def url(tiny_folder: Path, qdrant: Qdrant) -> Iterator[str]:
    engine = {"model": str(tiny_folder), "dtype": "float32", "kv_memory_gib": 0.1, "threads": 1}
    options = {"chunk_tokens": 64, "min_tokens": 128, "threshold": -1.0}
    retriever = {"long_content_tokens": 64, "options": options, "qdrant_url": qdrant.url}
    with served({"target": engine, "drafter": engine, "retriever": retriever}) as url:
        yield url


def answers(url: str) -> list[tuple[str, dict[str, Any]]]:
    return [complete(url, rapid) for rapid in STRATEGIES]


def test_requests_go_on_while_qdrant_is_dead(url: str, qdrant: Qdrant) -> None:
    plain, _ = complete(url, {"strategy": "autoregressive"})
    long, _ = complete(url, {"strategy": "lookup"}, num_tokens=1500)
    before = answers(url)
    assert all(statistics["fallback"] is None for _, statistics in before)
    assert before[0][1]["drafted"] and before[1][1]["drafted"]

    running = pieces(url, STRATEGIES[0], num_tokens=300)
    begun, _ = next(running)
    qdrant.kill()
    assert begun + "".join(text for text, _ in running) == long[:300]
    for text, statistics in answers(url):
        assert text == plain
        assert (statistics["fallback"], statistics["retrieved_tokens"]) == ("retrieval_failed", 0)
        assert statistics["drafted"] == statistics["lookup_drafted"]

    running = pieces(url, STRATEGIES[0], num_tokens=1500)
    begun, _ = next(running)
    qdrant.start()
    *rest, (end, statistics) = running
    assert begun + "".join(text for text, _ in rest) + end == long
    assert statistics["fallback"] is None and statistics["drafted"]  # within the same answer
    assert [text for text, _ in answers(url)] == [text for text, _ in before]


def test_requests_go_on_while_the_retriever_is_dead(url: str) -> None:
    before = answers(url)
    [retriever] = [
        process
        for process in psutil.Process().children(recursive=True)
        if " ".join(process.cmdline()).startswith("ray::ServeReplica:rapid:Retriever")
    ]
    retriever.kill()
    retriever.wait()
    text, statistics = complete(url, STRATEGIES[0])
    assert text == before[0][0]
    assert (statistics["fallback"], statistics["drafted"]) == ("retrieval_failed", 0)

    deadline = time.monotonic() + 300
    while complete(url, STRATEGIES[0])[1]["fallback"]:
        assert time.monotonic() < deadline
    assert [text for text, _ in answers(url)] == [text for text, _ in before]
