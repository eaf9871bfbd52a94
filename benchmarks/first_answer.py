"""From a fresh clone to the first streamed answer: `make serve` with no environment, no models and no pip cache.

Then the second start, in the same clone. Each measurement ends at the first token of an answer about a real document.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.common.results import DATA, write

URL = "http://127.0.0.1:8000"
QUESTION = "Why does the narrator go to sea?"


def ask() -> tuple[float, float, str]:
    """(seconds to the first text, seconds to the end, the answer) of a question about 8,000 characters of a novel."""
    document = (DATA / "moby-dick.txt").read_text(encoding="utf-8")[30_000:38_000]
    body = {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": f"{document}\n\n{QUESTION}"}],
        "max_tokens": 64,
        "temperature": 0,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{URL}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    started, first, text = time.monotonic(), 0.0, ""
    with urllib.request.urlopen(request, timeout=300) as response:
        for line in response:
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    if piece := choice["delta"].get("content"):
                        first = first or time.monotonic() - started
                        text += piece
    return first, time.monotonic() - started, text


def healthy() -> bool:
    try:
        with urllib.request.urlopen(f"{URL}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def start(clone: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Runs `make serve` until it has answered one question, and stops it."""
    if healthy():
        raise SystemExit(f"something already answers on {URL}; stop it first")
    started = time.monotonic()
    serving = subprocess.Popen(["make", "serve"], cwd=clone, env=environment, start_new_session=True)
    try:
        while not healthy():
            if serving.poll() is not None:
                raise SystemExit(f"make serve ended with {serving.returncode}")
            time.sleep(0.2)
        healthy_s = time.monotonic() - started
        first_token_s, total_s, text = ask()
    finally:
        os.killpg(serving.pid, signal.SIGTERM)
        serving.wait(timeout=60)
    return {
        "until_healthy_s": round(healthy_s, 1),
        "first_token_after_request_s": round(first_token_s, 1),
        "until_first_token_s": round(healthy_s + first_token_s, 1),
        "answer_s": round(total_s, 1),
        "answer": text,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "rapid"
        subprocess.run(["git", "clone", "--quiet", ".", str(clone)], check=True)
        environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
        environment |= {"RAPID_CACHE": f"{folder}/models", "PIP_NO_CACHE_DIR": "1"}
        results = {"first": start(clone, environment), "second": start(clone, environment)}
    for name, seen in results.items():
        print(f"{name} start: first token after {seen['until_first_token_s']} s (healthy {seen['until_healthy_s']} s)")
    write("first_answer", results)


if __name__ == "__main__":
    main()
