"""A process of another checkout (a git worktree) that measures what it is asked: earlier code, the same machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[2]


class Checkout:
    """``program`` in ``source``. It prints "ready", then a line of JSON for each that it reads."""

    def __init__(self, source: Path, program: str, *arguments: int) -> None:
        self._worker = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            cwd=source,
            env=os.environ | {"PYTHONPATH": str(source)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._worker.stdout is not None
        if self._worker.stdout.readline().strip() != "ready":
            raise SystemExit(f"{source}: the worker did not start")

    def ask(self, *question: Any) -> Any:
        assert self._worker.stdin is not None and self._worker.stdout is not None
        self._worker.stdin.write(json.dumps(question) + "\n")
        self._worker.stdin.flush()
        return json.loads(self._worker.stdout.readline())

    def end(self) -> None:
        """Ends the process, whose questions are over."""
        assert self._worker.stdin is not None
        self._worker.stdin.close()
        self._worker.wait(60)
