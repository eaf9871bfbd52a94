"""A datastore of the two novels, made by the command line as a user would make it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common.results import DATA

NOVELS = ("moby-dick.txt", "pride-and-prejudice.txt")


def build(folder: Path, model: str) -> dict[str, Any]:
    """Runs `rapid datastore build` for ``model``'s tokens; returns what it prints as JSON."""
    files = [str(DATA / name) for name in NOVELS]
    rapid = [sys.executable, "-c", "from deployments.cli.main import main; main()"]
    command = [*rapid, "datastore", "build", *files, "--out", str(folder), "--target", model, "--json"]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    built: dict[str, Any] = json.loads(told.stdout)
    return built
