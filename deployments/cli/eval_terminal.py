"""What a person sees of `rapid eval`: a bar with the time left, then tables. All but the tables goes to stderr."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from deployments.evaluation.answers import Answer
from deployments.evaluation.config import Row
from deployments.evaluation.summary import Summary
from deployments.evaluation.tables import Cell, needed, notes, tables

_SAID_EVERY = 50  # answers, where no bar can be drawn


class EvalTerminal:
    """Watches a run, and shows what came of it."""

    def __init__(self) -> None:
        disable_progress_bar()  # transformers' own, for weights that are on the disk already
        self._stderr, self._stdout = Console(stderr=True, highlight=False), Console(highlight=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._bars = Progress(*columns, console=self._stderr, transient=True, disable=not self._stderr.is_terminal)
        self._bar = TaskID(0)
        self._done = self._total = 0

    def __enter__(self) -> Self:
        self._bars.start()
        self._bar = self._bars.add_task("loading", total=None, left="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bars.stop()
        if error is not None and self._done:
            self._say(f"{self._done:,} of {self._total:,} answers are kept: the same command goes on from there")

    def begins(self, num_answers: int, num_known: int) -> None:
        self._done, self._total = num_known, num_answers
        kept = f", of which {num_known:,} are there already" if num_known else ""
        self._say(f"{num_answers:,} answers{kept}")
        self._bars.update(self._bar, total=num_answers, completed=num_known)

    def opens(self, system: str) -> None:
        self._bars.update(self._bar, description=escape(system))

    def leaves_out(self, row: Row, why: str, num_answers: int) -> None:
        self._total -= num_answers
        self._bars.update(self._bar, total=self._total)
        self._say(f"{row.name} is left out: {why}")

    def estimates(self, total_s: float) -> None:
        self._say(f"about {_duration(total_s)} in all, as far as the first answers tell")

    def answers(self, answer: Answer, left_s: float) -> None:
        self._done += 1
        self._bars.update(self._bar, completed=self._done, description=escape(answer.task), left=_left(left_s))
        if not self._stderr.is_terminal and self._done % _SAID_EVERY == 0:
            self._say(f"{self._done:,} of {self._total:,} answers; {_left(left_s)}")

    def show(self, summary: Summary, output: Path) -> None:
        """The tables, what must be known of them, and where the rest is."""
        if not self._stdout.is_terminal:
            self._stdout.width = max(self._stdout.width, 200)
        for table in tables(summary):
            drawn = Table(title=escape(table.title), title_justify="left")
            for i, name in enumerate(table.header):
                drawn.add_column(escape(name), justify="right" if i else "left", no_wrap=not i)
            for row in table.rows:
                drawn.add_row(*map(_drawn, row))
            self._stdout.print(drawn)
        for line in [*notes(summary), *needed(summary)]:
            self._stdout.print(f"[dim]{escape(line)}[/dim]")
        self._say(f"{output / 'report.html'} shows single questions")

    def _say(self, text: str) -> None:
        self._stderr.print(f"rapid: {escape(text)}")


def _drawn(cell: Cell) -> str:
    detail = f"\n[dim]{escape(cell.detail)}[/dim]" if cell.detail else ""
    return escape(cell.text) + detail


def _left(seconds: float) -> str:
    return f"{_duration(seconds)} left"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
