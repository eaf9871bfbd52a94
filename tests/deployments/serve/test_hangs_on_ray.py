"""Engines whose processes are stopped (SIGSTOP) under an answer, on Ray: they count as dead, and /health says so."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from served import ON_RAY, complete, engines_named, local_api, pieces, served

pytestmark = ON_RAY

SPECULATIVE: dict[str, Any] = {"strategy": "speculative", "num_draft_tokens": 3}
LENGTH = 600
NUM_ENGINES = {"Target": 2, "Drafter": 1}
MOST_SILENT_S = 10.0  # what is promised
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> dict[str, Any]:
    return {"model": str(tiny_folder), "dtype": "float32", "kv_memory_gib": 0.1, "threads": 1, "num_cpus": 0.2}


@pytest.fixture(scope="module")
def expected(engine: dict[str, Any]) -> str:
    """What one process writes without any drafts."""
    with local_api({"target": engine, "colocated": True}) as url:
        return complete(url, {"strategy": "autoregressive"}, LENGTH)[0]


@pytest.fixture(scope="module")
def url(engine: dict[str, Any]) -> Iterator[str]:
    config = {
        "served_model": "letters",
        "target": engine | {"replicas": {"min": NUM_ENGINES["Target"], "max": NUM_ENGINES["Target"]}},
        "drafter": engine,
        "retriever": {
            "long_content_tokens": 64,
            "options": {"chunk_tokens": 64, "min_tokens": 128, "threshold": -1.0},
        },
    }
    with served(config) as url:
        yield url


class Watch:
    """What /health says, until the block ends."""

    def __init__(self, url: str) -> None:
        self._url, self._ended = url, threading.Event()
        self.problems: list[dict[str, str]] = []
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._ended.wait(0.2):
            answer = httpx.get(f"{self._url}/health", timeout=MOST_SILENT_S)
            if answer.status_code == 200 and answer.json()["status"] == "degraded":
                self.problems.append(answer.json()["problems"])


def at_work(deployment: str) -> int:
    """The process of the engine that holds a sequence."""
    for engine in engines_named(deployment):
        if ray.get(engine.stats.remote(), timeout=LIMIT_S).num_sequences:
            pid: int = ray.get(engine.pid.remote(), timeout=LIMIT_S)
            return pid
    raise AssertionError(f"no {deployment} works")


@pytest.mark.parametrize("stopped", list(NUM_ENGINES))
def test_an_answer_survives_an_engine_that_hangs(url: str, expected: str, stopped: str) -> None:
    running = pieces(url, SPECULATIVE, LENGTH)
    text, _ = next(running)
    pid = at_work(stopped)
    with Watch(url) as watch:
        os.kill(pid, signal.SIGSTOP)
        times, rest = [time.monotonic()], []
        for came in running:
            times.append(time.monotonic())
            rest.append(came)
        assert text + "".join(piece for piece, _ in rest) == expected
        lost = rest[-1][1]["resumed"], rest[-1][1]["drafters_lost"]
        assert lost == ((0, 1) if stopped == "Drafter" else (1, 0))
        assert max(later - earlier for earlier, later in pairwise(times)) < MOST_SILENT_S
        deadline = time.monotonic() + LIMIT_S
        while psutil.pid_exists(pid):  # the replica ends it, and Serve starts another
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert any(stopped.lower() in problems for problems in watch.problems)
    while complete(url, SPECULATIVE)[1]["drafted"] == 0 or len(engines_named(stopped)) < (
        2 if stopped == "Target" else 1
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)
