"""The GPU benchmark runs on every path without a GPU, so that it works on the day there is one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu


def test_every_path_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "gpu.json"
    arguments = ["--tiny", "--contexts", "300", "--quantizations", "none", "int8", "fp8", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    gpu.main()
    results = json.loads(output.read_text())
    assert results["rows"][0]["context"] == 300
    assert results["drafter_int8"]["end_to_end"]["ratio"] > 0
    assert "fp8" in results["drafter_fp8"]["error"]
    assert results["generate_tokens_per_second"] > 0
