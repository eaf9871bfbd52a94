"""How far a row of an evaluation is from other rows on the same questions, whatever its baseline was.

The command of an evaluation compares each row with one baseline. This one reads the answers that are there already.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import rapid  # noqa: F401 (before torch)

# isort: split

from rich.console import Console
from rich.table import Table

from benchmarks.common.results import write
from deployments.evaluation.answers import read_answers
from deployments.evaluation.statistics import paired_difference, permutation_test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the folder of the run")
    parser.add_argument("--row", default="RAPID")
    parser.add_argument("--against", nargs="+", default=["LC", "RAG"])
    parser.add_argument("--least", type=int, default=20, help="questions of a task that is compared")
    options = parser.parse_args()
    summary = json.loads((options.output / "summary.json").read_text(encoding="utf-8"))
    metrics = {line["task"]: (line["metric"], line["best"]) for line in summary["quality"]}
    scores: dict[tuple[str, str, float], dict[str, float]] = {}
    for answer in read_answers(options.output):
        metric, best = metrics[answer.task]
        if metric in answer.scores:
            cell = scores.setdefault((answer.task, answer.row, answer.temperature), {})
            cell[answer.question] = answer.scores[metric] / best
    pairs = []
    for (task, row, temperature), ours in scores.items():
        for other in options.against if row == options.row else []:
            theirs = scores.get((task, other, temperature), {})
            shared = [question for question in ours if question in theirs]
            if len(shared) < options.least:
                continue
            both = [ours[question] for question in shared], [theirs[question] for question in shared]
            pairs.append(
                {
                    "task": task,
                    "temperature": temperature,
                    "against": other,
                    "questions": len(shared),
                    "difference": [round(value, 4) for value in paired_difference(*both)],
                    "p": round(permutation_test(*both), 4),
                }
            )
    table = Table("task", "T", "against", "questions", "difference", "p", title=options.row)
    for pair in pairs:
        value, low, high = (f"{100 * number:+.1f}" for number in pair["difference"])
        cells = pair["task"], pair["temperature"], pair["against"], pair["questions"], f"{value} ({low} to {high})"
        table.add_row(*map(str, cells), str(pair["p"]))
    Console().print(table)
    write("eval_pairs", {"row": options.row, "pairs": pairs})


if __name__ == "__main__":
    main()
