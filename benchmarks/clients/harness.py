"""What the clients' scripts have in common. They run in the clients' own environment, where nothing of RAPID is.

A script tells of each feature in a line of JSON. Where it can it compares with the same request sent by hand.
"""

from __future__ import annotations

import json
import os
import time
import traceback
import urllib.request
from collections.abc import Callable
from typing import Any

URL = os.environ["RAPID_URL"]
MODEL = os.environ["RAPID_MODEL"]
V1 = f"{URL}/v1"
QUESTION = "Name three colours."
MESSAGES = [{"role": "user", "content": QUESTION}]
CITY = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}}, "required": ["city"],
        "additionalProperties": False}  # fmt: skip
WEATHER = {"name": "weather", "description": "How the weather is in a city", "parameters": CITY}

_features: dict[str, Callable[[], Any]] = {}


def feature(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Registers a function that uses a feature; it raises where that does not work, and may return what it saw."""

    def add(function: Callable[[], Any]) -> Callable[[], Any]:
        _features[name] = function
        return function

    return add


def post(path: str, **body: Any) -> dict[str, Any]:
    """A request by hand."""
    data = json.dumps({"model": MODEL, **body}).encode()
    request = urllib.request.Request(V1 + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return dict(json.loads(response.read()))


def greedy(max_tokens: int = 16, **more: Any) -> str:
    """The greedy answer to `MESSAGES`, by hand."""
    answer = post("/chat/completions", messages=MESSAGES, max_tokens=max_tokens, temperature=0, **more)
    return str(answer["choices"][0]["message"]["content"])


def check(found: Any, expected: Any) -> None:
    if found != expected:
        raise AssertionError(f"got {str(found)[:200]!r}, not {str(expected)[:200]!r}")


def is_city(text: str) -> None:
    """Whether a text is an object with a known city."""
    check(json.loads(text).get("city") in ("Rome", "Oslo"), True)


def main() -> None:
    for name, function in _features.items():
        began = time.monotonic()
        told: dict[str, Any] = {"feature": name, "ok": True}
        try:
            if (saw := function()) is not None:
                told["saw"] = saw
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            told |= {"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]} ({last.name})"}
        print(json.dumps(told | {"seconds": round(time.monotonic() - began, 1)}), flush=True)
