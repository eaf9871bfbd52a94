"""`rapid eval` over HTTP: the same questions of this project's server and of another project's, in one table.

The peer is `transformers serve` with the same weights. Rows that it cannot do are left out, which the table says. A
third system, the models in this process, shows what HTTP and Ray cost.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

import rapid  # noqa: F401 (before torch)

# isort: split

from benchmarks.common.local import MODEL, config
from benchmarks.common.results import DATA, write
from benchmarks.common.served import free_port, served, wait_for
from deployments.cli.eval_terminal import EvalTerminal
from deployments.evaluation.answers import Answer, read_answers
from deployments.evaluation.config import Evaluation, parse_evaluation
from deployments.evaluation.evaluate import evaluate
from rapid.weights import embedded_models

TASKS = [
    {"name": "nq:depth=shared", "as_name": "nq", "context_tokens": 4000, "max_tokens": 32, "limit": 12},
    {"name": "qmsum:keep=evidence", "as_name": "qmsum", "context_tokens": 2000, "max_tokens": 48, "limit": 8},
]


@contextmanager
def peer() -> Iterator[str]:
    """`transformers serve` with the weights of `MODEL`, in their own type, on a free port; yields its URL.

    It knows the model by the name of a folder in its working directory, and names no model of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MODEL).symlink_to(embedded_models.resolve(MODEL))
        port, program = free_port(), Path(sys.executable).with_name("transformers")
        command = [str(program), "serve", MODEL, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
        server = subprocess.Popen(command, cwd=folder)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, server)
            yield url
        finally:
            server.terminate()
            server.wait(timeout=60)


def evaluation(ours: str, theirs: str, data: Path, limit: int | None) -> Evaluation:
    """The rows of three systems. All are compared with this server's target alone."""
    transfer = {"strategy": "rapid", "transfer_strength": 10.0, "transfer_temperature": 1.0}
    kept = {"retrieval": {"max_tokens": 512, "keep": True}}  # vectors, as the models in this process do
    fields: dict[str, Any] = {
        "data": data,
        "tokenizer": MODEL,
        "limit": limit,
        "tasks": TASKS,
        "systems": {
            "ours": {"url": f"{ours}/v1"},
            "theirs": {"url": f"{theirs}/v1", "model": MODEL},
            "here": {"args": config()},
        },
        "rows": [
            {"name": "LC", "system": "ours"},
            {"name": "RAG", "system": "ours", "rapid": {"strategy": "rag"} | kept},
            {"name": "SD", "system": "ours", "rapid": {"strategy": "speculative"} | kept},
            {"name": "RAPID", "system": "ours", "rapid": transfer | kept},
            {"name": "LC, transformers serve", "system": "theirs"},
            {"name": "RAPID, transformers serve", "system": "theirs", "rapid": transfer | kept},
            {"name": "LC, in this process", "system": "here"},
        ],
    }
    return parse_evaluation(fields, source="eval_url")


def seconds(answers: list[Answer]) -> dict[str, dict[str, float]]:
    """By task and row, the mean seconds of an answer as the client waits for it, its prompt read or known."""
    tasks = sorted({answer.task for answer in answers})
    rows = list(dict.fromkeys(answer.row for answer in answers))
    return {
        task: {
            row: round(fmean(answer.total_s for answer in answers if (answer.task, answer.row) == (task, row)), 3)
            for row in rows
        }
        for task in tasks
    }


def ms_a_token(answers: list[Answer]) -> dict[str, dict[str, float]]:
    """By row, the quartiles of decoding's milliseconds a token: what else a machine does moves the upper ones first."""
    found = {}
    for row in dict.fromkeys(answer.row for answer in answers):
        each = [1e3 * answer.decode_s / answer.decoded for answer in answers if answer.row == row and answer.decoded]
        names = ("first quartile", "median", "third quartile")
        found[row] = {name: round(value, 1) for name, value in zip(names, quantiles(each, n=4), strict=True)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--limit", type=int, help="the most questions of each task")
    parser.add_argument("--output", type=Path, default=Path("evaluation_url"))
    options = parser.parse_args()
    terminal = EvalTerminal()
    with served() as ours, peer() as theirs, terminal:
        asked = evaluation(ours, theirs, options.data, options.limit)
        summary = asyncio.run(evaluate(asked, options.output, terminal))
    terminal.show(summary, options.output)
    results = summary.as_object()
    results["evaluation"]["data"] = "DATA"
    answers = read_answers(options.output)
    write("eval_url", results | {"seconds_an_answer": seconds(answers), "decode_ms_a_token": ms_a_token(answers)})


if __name__ == "__main__":
    main()
