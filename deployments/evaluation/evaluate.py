"""A whole evaluation: from what is asked for to the files of its results."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.evaluation.answers import AnswersFile
from deployments.evaluation.config import Evaluation
from deployments.evaluation.judging import JudgeClient
from deployments.evaluation.plots import pictures
from deployments.evaluation.report import render
from deployments.evaluation.run import Asked, Run, Watcher
from deployments.evaluation.runner import Runner
from deployments.evaluation.server_runner import ServerRunner
from deployments.evaluation.summary import Summary, summarize
from deployments.evaluation.task import EvaluationError, TaskSettings
from deployments.evaluation.tasks import make_task
from deployments.machine import machine
from rapid.text.encoding import encode
from rapid.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TaskTokenizer:
    """A model's tokenizer as tasks use it: special tokens are text to it, and none are added."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return encode(self._tokenizer, text)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens)))


def prepare(evaluation: Evaluation) -> list[Asked]:
    """The tasks with their questions.

    Raises:
        EvaluationError: a task is unknown, its data is missing, or it has no questions.
    """
    tokenizer = TaskTokenizer(load_tokenizer(evaluation.cuts_with))
    asked = []
    for choice in evaluation.tasks:
        task = make_task(choice.name)
        settings = TaskSettings(
            tokenizer=tokenizer,
            data=choice.data or evaluation.data,
            from_hub=evaluation.from_hub,
            context_tokens=_least(choice.context_tokens, evaluation.context_tokens),
            limit=_least(choice.limit, evaluation.limit),
            seed=evaluation.seed,
        )
        questions = list(task.questions(settings))
        if not questions:
            raise EvaluationError(f"task {choice.label}: it has no questions")
        if (most := choice.max_tokens) is not None:
            questions = [replace(question, max_tokens=min(question.max_tokens, most)) for question in questions]
        asked.append(Asked(choice, task, questions))
    return asked


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


@contextmanager
def open_system(evaluation: Evaluation, name: str) -> Iterator[Runner]:
    """The runner of a system; its models are in memory until the end."""
    system = evaluation.systems[name]
    if system.url is not None:
        yield ServerRunner(system)
        return
    from deployments.evaluation.local_runner import LocalRunner

    with LocalRunner.open(system) as runner:
        yield runner


async def evaluate(evaluation: Evaluation, output: Path, watcher: Watcher) -> Summary:
    """Asks what is not answered in ``output`` yet, and writes the summary, the pictures and the report there.

    Raises:
        EvaluationError: a task cannot be asked, or ``output`` holds another run's answers.
        RapidError: a system failed; the same call goes on from there.
    """
    asked = prepare(evaluation)
    judge = JudgeClient(evaluation.judge_url, evaluation.judge_model) if evaluation.judge_url else None
    with AnswersFile.open(output) as answers:
        run = Run(evaluation, asked, answers, judge, watcher)
        ran = await run.ask(lambda name: open_system(evaluation, name))
        summary = summarize(evaluation, asked, answers.known.values(), ran)
        write(summary, asked, answers, output)
    return summary


def write(summary: Summary, asked: Sequence[Asked], answers: AnswersFile, output: Path) -> None:
    """Writes summary.json, with the command, the date and the machine, report.html and the pictures."""
    stamp = {
        "command": f"rapid {shlex.join(sys.argv[1:])}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
    }
    written = json.dumps(stamp | summary.as_object(), indent=1)
    (output / "summary.json").write_text(written + "\n", encoding="utf-8")
    for name, picture in pictures(summary).items():
        (output / f"{name}.svg").write_text(picture, encoding="utf-8", errors="replace")
    page = render(summary, asked, answers.known.values())
    (output / "report.html").write_text(page, encoding="utf-8", errors="replace")
