"""Reads results, and writes them with a stamp: the machine, the versions, and the command that made them."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from deployments.machine import machine

FOLDER = Path(__file__).parents[1] / "results"
DATA = Path(__file__).parents[3] / "shared" / "data"


@cache
def commit() -> str:
    """The commit that is checked out, shortened."""
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip()


def write(name: str, results: dict[str, Any], *, part: str = "") -> Path:
    """Writes ``results`` of `python -m benchmarks.NAME` to benchmarks/results/NAME.json, or NAME_PART.json."""
    arguments = " ".join(sys.argv[1:])
    stamp = {
        "command": f"python -m benchmarks.{name} {arguments}".strip(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
    }
    path = FOLDER / f"{name}{part and '_'}{part}.json"
    path.write_text(json.dumps(stamp | results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path


def read(name: str) -> dict[str, Any]:
    """The results in benchmarks/results/NAME.json."""
    results: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return results
