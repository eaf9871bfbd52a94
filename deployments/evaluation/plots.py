"""Pictures of a summary, as SVG: gains with their intervals, speeds, and lines over an axis.

They are text that a page holds as it is, so everything named in them is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from deployments.evaluation.summary import Quality, Speed, Summary

COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#0a7ea4", "#bf3989", "#57606a", "#bc4c00")
_WIDTH, _STEP, _HEAD = 720, 22, 34
_LETTER = 7.4  # the width of one in a label, at most on average
_ENOUGH = 10  # questions; of fewer an interval is as wide as the picture, and tells nothing
_STYLE = (
    "<style>text{font:12px system-ui,sans-serif;fill:#1f2328}.title{font-weight:600}.grid{stroke:#d0d7de}"
    ".zero{stroke:#1f2328}.tick{fill:#57606a;font-size:11px}</style>"
)


class Mark(NamedTuple):
    """A value with the ends of its interval; both are the value where there is none."""

    name: str
    value: float
    low: float
    high: float
    colour: int = 0


class Line(NamedTuple):
    """Points (x, value, low, high) in the order of x."""

    name: str
    points: list[tuple[float, float, float, float]]


def pictures(summary: Summary) -> dict[str, str]:
    """The pictures of a summary by the names of their files, without .svg."""
    made: dict[str, str] = {}
    for temperature in summary.evaluation.temperatures:
        suffix = f"-t{temperature:g}"
        gains = [q for q in summary.quality if q.against and q.temperature == temperature]
        if gains:
            made[f"gains{suffix}"] = _gains(gains, temperature)
        rates = [s for s in summary.speed if not s.task and s.tokens_per_second and s.temperature == temperature]
        if rates:
            marks = [Mark(s.row, s.tokens_per_second or 0, 0, 0, i) for i, s in enumerate(rates)]
            made[f"speed{suffix}"] = bars(f"Tokens a second, temperature {temperature:g}", marks)
        if summary.evaluation.axis:
            for name, lines in _over_axis(summary, temperature).items():
                title = f"{name}, temperature {temperature:g}"
                made[f"{name.lower().replace(' ', '-')}{suffix}"] = chart(title, summary.evaluation.axis, lines)
    return made


def _gains(gains: Sequence[Quality], temperature: float) -> str:
    """Of the rows that were asked enough questions, if there are any."""
    marks = []
    title = f"Gain over the baseline with 95% intervals, temperature {temperature:g}"
    if enough := [q for q in gains if q.questions >= _ENOUGH]:
        title += f", of at least {_ENOUGH} questions" if len(enough) < len(gains) else ""
        gains = enough
    names = list(dict.fromkeys(q.row for q in gains))
    for q in gains:
        assert q.against is not None
        value, low, high = (number * q.scale for number in q.against.gain)
        marks.append(Mark(f"{q.task} · {q.row}", value, low, high, names.index(q.row)))
    return dots(title, marks)


def _over_axis(summary: Summary, temperature: float) -> dict[str, list[Line]]:
    """Lines of quality and of speed: over the places of rows, a line for each task; or of tasks, one for each row."""
    rows = {row.name: row for row in summary.evaluation.rows}
    tasks = {task.label: task for task in summary.evaluation.tasks}
    by_row = any(row.at is not None for row in rows.values())
    places = {}
    kinds: list[Quality | Speed] = [*summary.quality, *summary.speed]
    for kind in kinds:
        if kind.temperature != temperature or kind.task not in tasks:
            continue
        row, task = rows[kind.row], tasks[kind.task]
        at = row.at if by_row else task.at
        if at is not None:
            places[id(kind)] = (at, f"{row.line or ''} {kind.task}".strip() if by_row else kind.row)

    def lines(values: list[tuple[Quality | Speed, tuple[float, float, float]]]) -> list[Line]:
        found: dict[str, Line] = {}
        for kind, value in values:
            if id(kind) in places:
                at, name = places[id(kind)]
                found.setdefault(name, Line(name, [])).points.append((at, *value))
        return [Line(line.name, sorted(line.points)) for line in found.values()]

    quality = [(q, (q.mean[0] * q.scale, q.mean[1] * q.scale, q.mean[2] * q.scale)) for q in summary.quality if q.mean]
    speed = [(s, (s.tokens_per_second,) * 3) for s in summary.speed if s.tokens_per_second]
    acceptance = [(s, (s.acceptance,) * 3) for s in summary.speed if s.acceptance is not None]
    named = {"Quality": lines([*quality]), "Tokens a second": lines([*speed]), "Acceptance": lines([*acceptance])}
    return {name: found for name, found in named.items() if found}


def dots(title: str, marks: Sequence[Mark]) -> str:
    """A dot with its interval in each line, and a line at 0."""
    low = min(0.0, *(mark.low for mark in marks))
    high = max(0.0, *(mark.high for mark in marks))
    return _rows(title, marks, low, high, are_bars=False)


def bars(title: str, marks: Sequence[Mark]) -> str:
    """A bar from 0 in each line."""
    return _rows(title, marks, 0.0, max(mark.value for mark in marks), are_bars=True)


def _rows(title: str, marks: Sequence[Mark], low: float, high: float, *, are_bars: bool) -> str:
    span = (high - low) or 1.0
    low, high = low - (0 if are_bars else span / 20), high + span / 20
    height = _HEAD + _STEP * len(marks) + 24
    labels = min(12 + _LETTER * max(len(mark.name) for mark in marks), _WIDTH / 2)

    def x(value: float) -> float:
        return round(labels + (value - low) / (high - low) * (_WIDTH - labels - 60), 1)

    parts = [_text(0, 16, title, "title")]
    for tick in ticks(low, high):
        parts.append(f'<line class="{"zero" if tick == 0 else "grid"}" x1="{x(tick)}" x2="{x(tick)}" y1="{_HEAD - 8}" '
                     f'y2="{height - 20}"/>' + _text(x(tick), height - 6, f"{tick:g}", "tick", "middle"))  # fmt: skip
    for i, mark in enumerate(marks):
        y, colour = _HEAD + _STEP * i + 6, COLOURS[mark.colour % len(COLOURS)]
        parts.append(_text(labels - 8, y + 4, mark.name, anchor="end"))
        if are_bars:
            parts.append(
                f'<rect x="{x(0)}" y="{y - 7}" width="{x(mark.value) - x(0):.1f}" height="14" fill="{colour}"/>'
            )
            parts.append(_text(x(mark.value) + 4, y + 4, f"{mark.value:.1f}", "tick"))
        else:
            parts.append(f'<line x1="{x(mark.low)}" x2="{x(mark.high)}" y1="{y}" y2="{y}" stroke="{colour}" '
                         'stroke-width="2"/>')  # fmt: skip
            parts.append(f'<circle cx="{x(mark.value)}" cy="{y}" r="4" fill="{colour}"/>')
    return _svg(title, height, parts)


def chart(title: str, axis: str, lines: Sequence[Line]) -> str:
    """Lines over ``axis`` with an interval at each point."""
    points = [point for line in lines for point in line.points]
    left, right = min(p[0] for p in points), max(p[0] for p in points)
    low, high = min(0.0, *(p[2] for p in points)), max(p[3] for p in points) * 1.05 or 1.0
    height, bottom = 340, 340 - 44 - _STEP * ((len(lines) + 2) // 3)

    def x(value: float) -> float:
        return round(60 + (value - left) / ((right - left) or 1) * (_WIDTH - 100), 1)

    def y(value: float) -> float:
        return round(bottom - (value - low) / ((high - low) or 1) * (bottom - _HEAD), 1)

    parts = [_text(0, 16, title, "title"), _text(_WIDTH / 2, bottom + 34, axis, "tick", "middle")]
    for tick in ticks(low, high):
        parts.append(f'<line class="grid" x1="60" x2="{_WIDTH - 40}" y1="{y(tick)}" y2="{y(tick)}"/>'
                     + _text(54, y(tick) + 4, f"{tick:g}", "tick", "end"))  # fmt: skip
    parts += [_text(x(place), bottom + 18, f"{place:g}", "tick", "middle") for place in sorted({p[0] for p in points})]
    for i, line in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x(at)},{y(value)}" for at, value, _, _ in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for at, value, least, most in line.points:
            parts.append(f'<line x1="{x(at)}" x2="{x(at)}" y1="{y(least)}" y2="{y(most)}" stroke="{colour}"/>'
                         f'<circle cx="{x(at)}" cy="{y(value)}" r="3.5" fill="{colour}"/>')  # fmt: skip
        column, row = i % 3, i // 3
        parts.append(f'<rect x="{60 + column * 220}" y="{bottom + 46 + row * _STEP}" width="12" height="12" '
                     f'fill="{colour}"/>' + _text(78 + column * 220, bottom + 57 + row * _STEP, line.name))  # fmt: skip
    return _svg(title, height + 24, parts)


def ticks(low: float, high: float) -> list[float]:
    """At most eight round numbers from ``low`` to ``high``."""
    smallest = math.floor(math.log10(high - low)) - 1
    steps = (digit * 10.0**power for power in range(smallest, smallest + 3) for digit in (1, 2, 5))
    step = next(step for step in steps if (high - low) / step <= 7)
    return [round(i * step, 6) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:g}" width="{_WIDTH}" role="img"'
    return f'{head} aria-label="{escape(title)}">{_STYLE}{"".join(parts)}</svg>\n'
