"""This checkout against an earlier one on the same machine: decoding, time to first token, and coordination.

Each checkout has a process of its own with the models loaded; only one process works at a time. Each question has new
processes, because where one's memory lies can make some percent for all that it measures. The first one changes from
question to question, so that both see the same changes of the machine's speed. Ratios are of the later to the earlier
checkout.

With ``--part coordination`` each checkout's own `benchmarks.coordination` runs, as often as ``--repeats`` says, and
leaves its last result in each checkout's coordination.json. Its time over channels is compared around engines that
compute nothing, since what engines report of their own work has not always ended at the same line. What a round waits
for in the engines' processes is therefore timed from outside (`benchmarks.hand_offs`), in as many pairs of processes,
by turns of some rounds: one process of a run's length is several percent off.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common.checkouts import HERE, Checkout
from benchmarks.common.results import write

STRATEGIES = ("autoregressive", "rapid", "lookup")
TURNS, ROUNDS = 12, 20  # of each process, where two measure what a round waits for
# Runs in both checkouts, whose modules may lie elsewhere.
WORKER = """
import asyncio, json, sys
import rapid
try:
    from benchmarks.common.local import MODEL, config, run
    from benchmarks.common.questions import questions
    from deployments.builders import local_backend
    from rapid.text.tokenizer import load_tokenizer
except ImportError:
    from benchmarks.local import MODEL, config, run
    from benchmarks.questions import questions
    from deployments.assembly import local_backend
    from rapid.tokenization import load_tokenizer

async def measure(backend, settings, question, new_tokens, repeats):
    reading = await run(backend, settings, question.prompt, 0, 2, strategy="autoregressive")
    row = {"first_token": [reading.first_s]}
    await run(backend, settings, question.prompt, 0, 2, strategy="rapid", num_draft_tokens=1)
    for strategy in ("autoregressive", "rapid", "lookup"):
        ask = lambda: run(backend, settings, question.prompt, 0, new_tokens, strategy=strategy)
        timed = [await ask() for _ in range(repeats)]
        row[strategy] = [(each.statistics.emitted - 1) / each.decode_s for each in timed]
    return row

settings = config()
asked = list(questions(load_tokenizer(MODEL), int(sys.argv[1])))
with local_backend(settings) as backend:
    print("ready", flush=True)
    for line in sys.stdin:
        i, new_tokens, repeats = json.loads(line)
        print(json.dumps(asyncio.run(measure(backend, settings, asked[i], new_tokens, repeats))), flush=True)
"""


def ratio(row: dict[str, dict[str, list[float]]], what: str) -> float:
    """How many times as fast the later checkout is."""
    now, before = (statistics.median(row[side][what]) for side in ("now", "before"))
    return round(before / now if what == "first_token" else now / before, 3)


def over_channels_ms(source: Path) -> dict[str, float]:
    """The medians of one run of `benchmarks.coordination`."""
    environment = os.environ | {"PYTHONPATH": str(source)}
    command = [sys.executable, "-m", "benchmarks.coordination"]
    subprocess.run(command, cwd=source, env=environment, check=True, timeout=600, stdout=subprocess.DEVNULL)
    seen = json.loads((source / "benchmarks/results/coordination.json").read_text(encoding="utf-8"))
    return {
        "channels": seen["empty"]["coordination_ms_median"],
        "whole_round": seen["sampling"]["round_ms_median"],
    }


def around_tasks_ms(sources: dict[str, Path]) -> dict[str, float]:
    """The medians of what a round waits for around the engines' tasks, in one pair of processes."""
    program = (HERE / "benchmarks/hand_offs.py").read_text(encoding="utf-8")
    workers = {side: Checkout(source, program) for side, source in sources.items()}
    waited: dict[str, list[float]] = {side: [] for side in sources}
    for turn in range(1 + TURNS):
        for side in list(sources) if turn % 2 else list(sources)[::-1]:
            seen = workers[side].ask(ROUNDS)
            waited[side] += seen if turn else []  # what is first costs more
    for worker in workers.values():
        worker.end()
    return {side: round(statistics.median(each), 3) for side, each in waited.items()}


def coordination(sources: dict[str, Path], repeats: int) -> dict[str, Any]:
    rows: dict[str, list[dict[str, float]]] = {side: [] for side in sources}
    for i in range(repeats):
        around = around_tasks_ms(sources)
        for side in list(sources) if i % 2 else list(sources)[::-1]:
            rows[side].append(over_channels_ms(sources[side]) | {"around_tasks": around[side]})
            print(side, rows[side][-1], flush=True)
    medians = {
        what: {side: statistics.median(row[what] for row in rows[side]) for side in rows} for what in rows["now"][0]
    }
    pairs = [now["around_tasks"] / before["around_tasks"] for now, before in zip(*rows.values(), strict=True)]
    result = {
        "repeats": repeats,
        "median_ms": medians,
        "around_tasks_now_to_before": {
            "median": round(statistics.median(pairs), 3),
            "pairs": [round(p, 3) for p in pairs],
        },
        "rows": rows,
    }
    print({name: value for name, value in result.items() if name != "rows"})
    return result


def decoding(sources: dict[str, Path], prompt_tokens: int, questions: int, new_tokens: int, repeats: int) -> Any:
    rows: list[dict[str, Any]] = []
    for i in range(questions):
        sides = list(sources) if i % 2 else list(sources)[::-1]
        workers = {side: Checkout(sources[side], WORKER, prompt_tokens) for side in sides}
        row: dict[str, Any] = {side: workers[side].ask(i, new_tokens, repeats) for side in sides}
        for worker in workers.values():
            worker.end()
        row["ratio"] = {what: ratio(row, what) for what in ("first_token", *STRATEGIES)}
        rows.append(row)
        print(row["ratio"], flush=True)
    medians = {what: statistics.median(row["ratio"][what] for row in rows) for what in ("first_token", *STRATEGIES)}
    print("median:", medians)
    settings = {"prompt_tokens": prompt_tokens, "questions": questions, "new_tokens": new_tokens, "repeats": repeats}
    return {"settings": settings, "median": medians, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("against", type=Path, help="the earlier checkout (a git worktree)")
    parser.add_argument("--prompt-tokens", type=int, default=6950)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=["", "coordination"], default="")
    options = parser.parse_args()
    sources = {"now": HERE, "before": options.against.resolve()}
    if options.part:
        write("paired", coordination(sources, options.repeats), part=options.part)
    else:
        asked = (options.prompt_tokens, options.questions, options.new_tokens, options.repeats)
        write("paired", decoding(sources, *asked))


if __name__ == "__main__":
    main()
