"""What the shell offers on Tab, by the protocol of bash's completion."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rapid.speculation.verification import RULES

ROOT = Path(__file__).parents[3]


def offered(line: str) -> list[str]:
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1), "_RAPID_COMPLETE": "complete_bash"}
    code = "import sys; sys.argv = ['rapid']; from deployments.cli.main import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | words, capture_output=True, text=True, cwd=ROOT
    )
    return result.stdout.split()


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("rapid generate --strategy r", ["rag", "rest", "rapid"]),
        ("rapid chat --strategy l", ["lookup"]),
        ("rapid generate --verification ", list(RULES)),
        ("rapid generate --target s", ["smollm2-135m-instruct"]),
        ("rapid models pull a", ["all-minilm-l6-v2"]),
        ("rapid serve configs/cpu", ["configs/cpu-demo.yaml"]),
        ("rapid doctor serve", ["serve_config.yaml"]),
        ("rapid do", ["doctor"]),
        ("rapid datastore b", ["build"]),
    ],
)
def test_values_are_completed(line: str, values: list[str]) -> None:
    assert offered(line) == values
