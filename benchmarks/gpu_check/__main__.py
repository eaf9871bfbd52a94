"""What a GPU does with this project, in ten minutes: right or wrong, and how far from what the device can do.

Needs only torch, transformers, accelerate and triton, and no download: the weights are random, of Llama-3.1-8B's shape.
The file is written after each measurement, and a second run on the same device and commit goes on where the first
ended. `--pretend` runs every step on a small shape, on a CPU too. `docs/gpu.md` says what each figure should be.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import rapid  # noqa: F401 (before torch)

# isort: split
import torch

from benchmarks.gpu_check import device as below
from benchmarks.gpu_check import engines
from benchmarks.gpu_check.models import PRETENDED, REAL, Sizes
from benchmarks.gpu_check.progress import Progress, Result

RESULTS = Path(__file__).parents[1] / "results"
CUDA_TESTS = ("tests/rapid/kernels/test_choice.py", "tests/rapid/models/test_recorded_cuda.py")


def about(device: torch.device) -> Result:
    """What a result depends on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    versions = {}
    for package in ("torch", "triton", "transformers", "accelerate"):
        if importlib.util.find_spec(package) is not None:
            versions[package] = importlib.metadata.version(package)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "pretended, on a CPU",
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        **versions,
    }


def core_tests(progress: Progress) -> None:
    """The core's own tests that use a GPU where there is one."""

    def run() -> Result:
        if importlib.util.find_spec("pytest") is None:
            return {"left_out": "pytest is not installed"}
        # A bare machine has not the plug-ins whose options pyproject.toml sets, and pytest would refuse these.
        lenient = ["-o", "addopts=", "-W", "ignore::pytest.PytestConfigWarning"]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *lenient, *CUDA_TESTS]
        limit = max(30.0, progress.seconds_left)
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        return {"status": done.returncode, "summary": done.stdout.strip().splitlines()[-1:]}

    progress.measure("pytest", run)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--pretend", action="store_true", help="a small shape, on a CPU where there is no GPU")
    parser.add_argument("--minutes", type=float, default=10, help="when to end (default: %(default)s)")
    parser.add_argument("--device", help="cuda:N (default: the first)")
    parser.add_argument("--output", type=Path, help="the file of the results (default: benchmarks/results/)")
    options = parser.parse_args()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda" and not options.pretend:
        sys.exit("no GPU here; --pretend runs every step on a small shape")
    name = "gpu_check_pretended.json" if options.pretend else "gpu_check.json"
    with Progress(options.output or RESULTS / name, about(device), 60 * options.minutes) as progress:
        print(f"{progress.results['about']}\nresults: {progress.path}", flush=True)
        check(progress, PRETENDED if options.pretend else REAL, device)


def check(progress: Progress, sizes: Sizes, device: torch.device) -> None:
    """All steps, each within its share of the time."""
    per_ms, flops_per_ms = 1.0, 1.0
    with progress.step("device", 20):
        per_ms, flops_per_ms = below.peaks(progress, sizes, device)
    # (name, seconds, what it does): what decides whether anything else counts comes first.
    steps: list[tuple[str, float, Callable[[], None]]] = [
        ("attention", 70, lambda: below.attention(progress, sizes, device)),
        ("fused", 20, lambda: below.fused(progress, sizes, device)),
        ("graphs", 40, lambda: below.graphs(progress, sizes, device)),
        ("waits", 30, lambda: engines.waits(progress, sizes, device)),
        ("steps", 120, lambda: engines.steps(progress, sizes, device, per_ms)),
        ("products", 40, lambda: below.products(progress, sizes, device)),
        ("drafts", 60, lambda: engines.drafts(progress, sizes, device, per_ms)),
        ("prefill", 60, lambda: engines.prefill(progress, sizes, device, flops_per_ms)),
        ("requests", 150, lambda: engines.requests(progress, sizes, device)),
        ("seeds", 40, lambda: engines.seeds(progress, sizes, device)),
        ("core tests", 120, lambda: core_tests(progress)),
    ]
    for step, share_s, run in steps:
        with progress.step(step, share_s):
            run()


if __name__ == "__main__":
    main()
