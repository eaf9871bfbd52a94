"""What the tests ask the served application, and how they look at it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx

MODEL = "smollm2-135m-instruct"
QUESTION = "Who is speaking, and what does he want?"


def document(index: int, characters: int = 1600) -> str:
    """A passage of a novel where the shared texts are at hand, else one made of numbered sentences."""
    novel = Path(__file__).parents[3] / "shared" / "data" / "moby-dick.txt"
    if novel.exists():
        start = 30_000 + index * 40_000
        return novel.read_text(encoding="utf-8")[start : start + characters]
    sentences = (f"In room {n} of house {index} lives a person who counts {n * 7} birds.\n" for n in range(1000))
    return "".join(sentences)[:characters]


def chat(index: int = 0, question: str = QUESTION) -> list[Any]:
    return [{"role": "user", "content": f"{document(index)}\n\n{question}"}]


def health(url: str) -> dict[str, Any]:
    time.sleep(0.02)  # asking without a pause takes the cores from what is asked about
    body: dict[str, Any] = httpx.get(f"{url}/health", timeout=30).json()
    return body


def seconds_until_free(url: str, limit: float = 10.0) -> float:
    """How long until no engine holds a sequence or a byte of KV."""
    started = time.monotonic()
    while time.monotonic() - started < limit:
        state = health(url)
        if not any(state["sequences"].values()) and not any(state["kv_bytes"].values()):
            return time.monotonic() - started
    raise AssertionError(f"still held after {limit} s: {state}")
