"""What takes the time of a suite of `rapid eval`: answers and their seconds, by task, row and kind.

The seconds are those that the command's own estimate takes, from the answers that a run has written so far. The run may
have been ended after its first questions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import rapid  # noqa: F401 (before torch)

# isort: split

from benchmarks.common.results import DATA, write
from deployments.config import read_config
from deployments.evaluation.answers import read_answers
from deployments.evaluation.config import parse_evaluation
from deployments.evaluation.estimate import Cell, Estimate
from deployments.evaluation.evaluate import prepare
from deployments.evaluation.run import plan
from deployments.evaluation.suites import SUITES, suite_of


def by(cells: Iterable[Cell], estimate: Estimate, name: Callable[[Cell], str]) -> dict[str, dict[str, float]]:
    """Number of answers, seconds of all and of one, for the cells of each name."""
    found: dict[str, list[float]] = {}
    for cell in cells:
        found.setdefault(name(cell), []).append(estimate.expected_s(cell))
    return {
        key: {"answers": len(each), "seconds": round(sum(each), 1), "each": round(sum(each) / len(each), 2)}
        for key, each in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="paper-main")
    parser.add_argument("--output", type=Path, required=True, help="the folder of the run's answers")
    parser.add_argument("--serve-config", type=Path, default=Path("serve_config.yaml"))
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    fields = suite_of(options.suite, read_config(options.serve_config)) | {"data": options.data}
    evaluation = parse_evaluation(fields, source=options.suite)
    asked = prepare(evaluation)
    plans = [plan(evaluation, asked, system) for system in evaluation.systems]
    known = {answer.key: answer for answer in read_answers(options.output)}
    everything = [work for probes, others in plans for work in [*probes, *others]]
    estimate = Estimate(work.cell for work in everything)
    for work in everything:
        if answer := known.get(work.key):
            estimate.learn(work.cell, answer.total_s)
    cells = [work.cell for work in everything]
    results = {
        "suite": options.suite,
        "answers": len(cells),
        "answers_measured": sum(work.key in known for work in everything),
        "probes": [by((work.cell for work in probes), estimate, lambda _: "all")["all"] for probes, _ in plans],
        "minutes": round(sum(map(estimate.expected_s, cells)) / 60, 1),
        "by_task": by(cells, estimate, lambda cell: cell.task),
        "by_row": by(cells, estimate, lambda cell: cell.row),
        "by_kind": by(cells, estimate, lambda cell: cell.kind),
        "by_task_and_row": by(cells, estimate, lambda cell: f"{cell.task}, {cell.row}, T {cell.temperature:g}"),
    }
    write("eval_time", results)


if __name__ == "__main__":
    main()
