"""Advice on how to serve: by a user's own questions, with the evidence. It changes nothing by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from deployments.config import AppConfig
from deployments.evaluation.config import HERE, LC, Row
from deployments.evaluation.summary import Quality, Summary
from deployments.evaluation.tasks.own import has_answers

_TOLERATED = 2.0  # points of a hundred that a mean may lie below the target's own, where the test tells no difference
_CERTAIN = 0.05
_FEW = 30
Fields = dict[str, Any]
_TRANSFER: Fields = {"strategy": "rapid", "transfer_temperature": 1.0}


def candidates(questions: Path, args: AppConfig, *, is_judged: bool) -> dict[str, Any]:
    """The fields of an evaluation of ``questions`` by every way of serving that is compared.

    Raises:
        EvaluationError: it is no file of questions.
    """
    metric = "f1" if has_answers(questions) else "rating" if is_judged else "agreement"
    return {
        "systems": {HERE: {"args": args}},
        "tasks": [{"name": f"own:metric={metric}", "as_name": "own", "data": questions}],
        "rows": list(_rows(args)),
    }


def _rows(args: AppConfig) -> Iterator[dict[str, Any]]:
    def row(name: str, **options: Any) -> dict[str, Any]:
        return {"name": name, "rapid": options}

    yield row(LC, strategy="autoregressive")
    yield row("lookup", strategy="lookup")
    yield row("magicdec", strategy="magicdec")
    yield row("speculative", strategy="speculative")
    yield row("rag", strategy="rag")
    for eta in (5.0, 10.0, 20.0, "auto"):
        yield row(f"rapid, η {eta}", **_TRANSFER, transfer_strength=eta)
    for gamma in (4, 8):
        yield row(f"rapid, η auto, γ {gamma}", **_TRANSFER, transfer_strength="auto", num_draft_tokens=gamma)
    usual = args.retriever.options
    budget = usual.max_tokens or usual.min_tokens
    for tokens in (max(16, budget // 2), budget * 2):
        kept: Fields = {"retrieval": {"max_tokens": tokens}}
        yield row(f"rag, {tokens} tokens", strategy="rag", **kept)
        yield row(f"rapid, η auto, {tokens} tokens", **_TRANSFER, transfer_strength="auto", **kept)
    for method in ("dense", "sparse", "hybrid"):
        if method != usual.method:
            kept = {"retrieval": {"method": method}}
            yield row(f"rapid, η auto, {method}", **_TRANSFER, transfer_strength="auto", **kept)


class Candidate(NamedTuple):
    """A row, its quality, and the seconds that an answer takes about a document that is not read yet."""

    row: Row
    quality: Quality
    seconds: float


class Advice(NamedTuple):
    """The candidate to serve with, the reason, and all candidates, the fastest first."""

    chosen: Candidate
    reason: str
    candidates: list[Candidate]


def choose(summary: Summary) -> Advice:
    """A row that is surely better than the target alone, if there is one; else the fastest that is no worse.

    No worse means that the test finds no difference (p ≥ 0.05), and that the mean is at most 2 points of 100 below.
    """
    found = sorted(_candidates(summary), key=lambda candidate: candidate.seconds)
    better = [each for each in found if _gain(each) > 0 and _p(each) < _CERTAIN]
    if better:
        best = max(better, key=_gain)
        return Advice(best, f"its quality is surely above the target's own (p = {_p(best):.3f})", found)
    equal = [each for each in found if _gain(each) >= (-_TOLERATED if _p(each) >= _CERTAIN else 0)]
    chosen = min(equal, key=lambda candidate: candidate.seconds)
    return Advice(chosen, "it is the fastest of those whose quality is not found to be below the target's own", found)


def advice(summary: Summary) -> str:
    """The advice as the fragment of a configuration; the evidence stands in it as comments."""
    chosen, reason, found = choose(summary)
    metric = chosen.quality.metric
    lines = [f"# {chosen.row.name}: {reason}.", f"# {metric}, its difference to the target alone, and s an answer:"]
    for each in found:
        mean = each.quality.mean.value * each.quality.scale if each.quality.mean else 0.0
        mark = ">" if each is chosen else " "
        lines.append(f"# {mark} {each.row.name:<28}{mean:6.1f} {_interval(each):<24}{each.seconds:7.2f} s")
    if chosen.quality.questions < _FEW:
        lines.append(f"# {chosen.quality.questions} questions tell little; the paper's tables rest on hundreds.")
    if metric == "agreement":
        lines.append("# Without reference answers quality is agreement with the target's own: an answer that is better")
        lines.append("# than the target's counts as worse. References, or --judge-url, tell such answers apart.")
    return "\n".join([*lines, yaml.safe_dump(fragment(chosen.row), sort_keys=False, allow_unicode=True).rstrip()])


def fragment(row: Row) -> dict[str, Any]:
    """The part of a configuration's `args` with which requests are decoded like those of ``row``."""
    options = row.options()
    retrieval = options.pop("retrieval", {})
    return {"speculation": options} | ({"retriever": {"options": retrieval}} if retrieval else {})


def _candidates(summary: Summary) -> Iterator[Candidate]:
    temperature = summary.evaluation.temperatures[0]
    rows = {row.name: row for row in summary.evaluation.rows}
    qualities = {q.row: q for q in summary.quality if q.temperature == temperature and q.mean}
    for speed in summary.speed:
        if speed.task or speed.temperature != temperature or speed.row not in qualities:
            continue
        yield Candidate(rows[speed.row], qualities[speed.row], speed.seconds)


def _gain(candidate: Candidate) -> float:
    against = candidate.quality.against
    return against.gain.value * 100 / candidate.quality.best if against else 0.0


def _p(candidate: Candidate) -> float:
    return candidate.quality.against.p if candidate.quality.against else 1.0


def _interval(candidate: Candidate) -> str:
    against = candidate.quality.against
    if against is None:
        return ""
    value, low, high = (number * candidate.quality.scale for number in against.gain)
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
