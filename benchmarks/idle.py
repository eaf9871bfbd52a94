"""The cost of an idle `rapid serve`: seconds until it is ready, and the memory of each process.

Memory is the proportional set size: a page that several processes share counts for each of them in part, so the sum is
the real memory of the service. `--against FOLDER` measures a checkout of an earlier commit in turn with this one.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.memory import process_name
from benchmarks.first_answer import healthy

HERE = Path(__file__).parents[1]
SETTLE_S = 20.0
# The command line's module moved; an earlier checkout has it elsewhere.
RAPID = """
try:
    from deployments.cli.main import main
except ImportError:
    from deployments.cli import main
main(["serve", "serve_config.yaml"])
"""


def start(source: Path) -> dict[str, Any]:
    """Serves the checkout at ``source`` until it has been idle for a while."""
    if healthy():
        raise SystemExit("something already answers on port 8000; stop it first")
    environment = os.environ | {"PYTHONPATH": str(source)}
    started = time.monotonic()
    serving = subprocess.Popen([sys.executable, "-c", RAPID], cwd=source, env=environment, start_new_session=True)
    try:
        while not healthy():
            if serving.poll() is not None:
                raise SystemExit(f"rapid serve ended with {serving.returncode}")
            time.sleep(0.2)
        ready_s = time.monotonic() - started
        time.sleep(SETTLE_S)
        sizes: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        own = psutil.Process(serving.pid)
        for process in [own, *own.children(recursive=True)]:
            with suppress(psutil.Error):
                name = re.sub(r"_\w{20,}$|\d+$", "", process_name(process))
                sizes[name] += process.memory_full_info().pss
                counts[name] += 1
    finally:
        os.kill(serving.pid, signal.SIGTERM)
        serving.wait(timeout=60)
    by_process = {f"{name} ×{counts[name]}": round(size / 2**20, 1) for name, size in sizes.most_common()}
    return {"ready_s": round(ready_s, 1), "pss_mib": round(sum(sizes.values()) / 2**20), "by_process": by_process}


def main() -> None:
    from benchmarks.common.results import write

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="an earlier checkout, measured in turn with this one")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    sources = {"now": HERE} | ({"before": options.against.resolve()} if options.against else {})
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sources}
    for _ in range(options.repeats):
        for name, source in sources.items():
            runs[name].append(start(source))
            print(name, {key: runs[name][-1][key] for key in ("ready_s", "pss_mib")}, flush=True)
    medians = {
        name: {key: statistics.median(run[key] for run in each) for key in ("ready_s", "pss_mib")}
        for name, each in runs.items()
    }
    print(medians)
    write("idle", {"median": medians, "runs": runs})


if __name__ == "__main__":
    main()
