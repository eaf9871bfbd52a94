"""The GPU's check runs from beginning to end without a GPU, goes on where it was cut off, and ends in time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_check import __main__ as check
from benchmarks.gpu_check.progress import Progress, Result


def test_every_step_runs_on_a_pretended_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "check.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--pretend", "--output", str(output)])
    monkeypatch.setattr(check, "CUDA_TESTS", ("tests/benchmarks/test_load_checks.py",))
    check.main()
    steps = json.loads(output.read_text())["steps"]
    measurements = [(step, name, result) for step in steps for name, result in steps[step].items()]
    assert [m for m in measurements if "error" in m[2]] == []
    assert list(steps) == [
        "device",
        "attention",
        "fused",
        "graphs",
        "waits",
        "steps",
        "products",
        "drafts",
        "prefill",
        "requests",
        "seeds",
        "core tests",
    ]
    assert steps["graphs"]["replay equals eager"]["max_difference"] == 0
    assert all(r["max_error"] < 0.05 for name, r in steps["attention"].items() if name != "kernels")
    assert steps["core tests"]["pytest"]["status"] == 0
    drafted = [result for name, result in steps["requests"].items() if "accepted, drafter" in name]
    assert all(result["text_is_right"] for result in drafted)
    assert all(0.2 < result["accepted_of_drafted"] < 0.9 for result in drafted)


def measured(progress: Progress, **results: Result) -> list[str]:
    """The names of those of ``results`` that were measured and not known. The run ends with them."""
    called: list[str] = []

    def measurement(name: str, result: Result) -> Result:
        called.append(name)
        if "fault" in result:
            raise RuntimeError(result["fault"])
        return result

    with progress, progress.step("step", 100):
        for name, result in results.items():
            progress.measure(name, lambda n=name, r=result: measurement(n, r))  # type: ignore[misc]
    return called


def test_a_second_run_measures_only_what_the_first_has_not(tmp_path: Path) -> None:
    path, device = tmp_path / "check.json", {"device": "x"}
    assert measured(Progress(path, device, 100), a={"ms": 1.0}, b={"fault": "broken"}) == ["a", "b"]
    assert json.loads(path.read_text())["steps"]["step"] == {"a": {"ms": 1.0}, "b": {"error": "RuntimeError: broken"}}
    again = Progress(path, device, 100)
    assert measured(again, a={"ms": 2.0}, b={"ms": 3.0}) == ["b"]
    assert again.results["steps"]["step"] == {"a": {"ms": 1.0}, "b": {"ms": 3.0}}
    assert measured(Progress(path, {"device": "y"}, 100), a={"ms": 2.0}) == ["a"]


def test_no_measurement_begins_when_the_time_is_over(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "check.json", {}, 0)
    while progress.seconds_left >= 0:
        time.sleep(0)
    assert measured(progress, a={"ms": 1.0}) == []
    assert progress.results["steps"] == {"step": {}}


def test_a_measurement_that_hangs_ends_the_process_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    program = f"""
import threading
from pathlib import Path
from benchmarks.gpu_check.progress import Progress
progress = Progress(Path({str(path)!r}), {{}}, 2, grace_s=0.2)
with progress, progress.step("step", 100):
    progress.measure("a", lambda: {{"ms": 1.0}})
    progress.measure("b", lambda: threading.Event().wait() and {{}})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert "step: a measurement did not end in time" in done.stdout
    assert json.loads(path.read_text())["steps"]["step"] == {"a": {"ms": 1.0}}
