"""The tables of a summary as text, for the terminal and the report alike."""

from __future__ import annotations

from typing import NamedTuple

from deployments.evaluation.statistics import Interval
from deployments.evaluation.summary import Quality, Speed, Summary

NONE = "–"
_CERTAIN = 0.05


class Cell(NamedTuple):
    """What is read first, and what stands below it in small."""

    text: str
    detail: str = ""


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[Cell]]


def tables(summary: Summary) -> list[Table]:
    """A table for each temperature: a line for each row; quality by task, then speed over all tasks."""
    made = []
    for temperature in summary.evaluation.temperatures:
        quality = {(q.row, q.task): q for q in summary.quality if q.temperature == temperature}
        speed = {s.row: s for s in summary.speed if s.temperature == temperature and not s.task}
        tasks = list(dict.fromkeys(q.task for q in quality.values()))
        metrics = {q.task: q.metric for q in quality.values()}
        header = ["", *(f"{task} ({metrics[task]})" for task in tasks)]
        rows = []
        for name, its_speed in speed.items():
            cells = [_quality(quality[name, task]) for task in tasks]
            rows.append([Cell(name), *cells, *_speed(its_speed)])
        title = f"Temperature {temperature:g}"
        made.append(Table(title, [*header, "prefill s", "tokens/s", "speedup", "acceptance"], rows))
    return made


def notes(summary: Summary) -> list[str]:
    """What must be known of the tables, a sentence or two each."""
    rows = summary.evaluation.rows
    said = [
        "Quality: the mean, and below it the difference to the baseline on the same questions with its 95% interval; "
        f"* marks p < {_CERTAIN}. Speedup: the geometric mean of the questions' ratios to the baseline. "
        "Prefill: until the first round, where row and baseline both read the prompt.",
    ]
    others = {row.name: row.baseline for row in rows if row.baseline != rows[0].name and row.baseline != row.name}
    said += [f"{name} is compared with {baseline}." for name, baseline in others.items()]
    said += [f"{row.name}: {row.note}" for row in rows if row.note]
    said += [f"{name} is left out: {why}." for name, why in summary.ran.left_out.items()]
    if limited := [f"{row.name} {row.limit}" for row in rows if row.limit]:
        said.append(f"The most questions of a task that were asked of some rows: {', '.join(limited)}.")
    asked = {s.row for s in summary.speed if s.answers}
    if silent := [row.name for row in rows if row.name not in asked and row.name not in summary.ran.left_out]:
        said.append(f"No question could be asked of {', '.join(silent)}: none was cut, or there is but one document.")
    if clocked := list(dict.fromkeys(s.row for s in summary.speed if s.clock == "client")):
        said.append(f"tokens/s of {', '.join(clocked)}: measured at the client, from the first text to the last.")
    for s in summary.speed:
        if s.fallbacks and not s.task:
            reasons = ", ".join(f"{number} × {reason}" for reason, number in s.fallbacks.items())
            said.append(f"{s.row} at temperature {s.temperature:g} went without passages: {reasons} of {s.answers}.")
    for q in summary.quality:
        if q.failed or q.unscored:
            said.append(f"{q.row} in {q.task}: {q.failed} questions failed, {q.unscored} have no score.")
    return said


def needed(summary: Summary) -> list[str]:
    """How many questions would tell each difference that this run cannot tell."""
    lines = []
    for q in summary.quality:
        if q.against and q.against.needed and q.against.p >= _CERTAIN:
            gain = _signed(q.against.gain.value * q.scale)
            lines.append(
                f"{q.row} in {q.task} at temperature {q.temperature:g}: a difference of {gain} would take about "
                f"{q.against.needed:,} questions to tell (80% power); {q.against.questions} were asked."
            )
    return lines


def _quality(quality: Quality) -> Cell:
    if quality.mean is None:
        return Cell(NONE)
    scale = quality.scale
    if quality.against is None:
        return Cell(f"{quality.mean.value * scale:.1f}", _range(quality.mean, scale, "{:.1f}"))
    star = "*" if quality.against.p < _CERTAIN else ""
    gain = quality.against.gain
    return Cell(
        f"{quality.mean.value * scale:.1f}",
        f"{_signed(gain.value * scale)}{star} {_range(gain, scale, '{:+.1f}')}",
    )


def _speed(speed: Speed) -> list[Cell]:
    ratio = speed.speedup
    return [
        Cell(NONE if speed.reading_s is None else f"{speed.reading_s:.2f}"),
        Cell(NONE if speed.tokens_per_second is None else f"{speed.tokens_per_second:.1f}"),
        Cell(f"{ratio.value:.2f}×", _range(ratio, 1, "{:.2f}")) if ratio else Cell(NONE),
        Cell(NONE if speed.acceptance is None else f"{speed.acceptance:.0%}"),
    ]


def _range(interval: Interval, scale: float, form: str) -> str:
    return f"[{form.format(interval.low * scale)}, {form.format(interval.high * scale)}]"


def _signed(number: float) -> str:
    return f"{number:+.1f}"
