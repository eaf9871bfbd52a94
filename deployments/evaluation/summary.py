"""What the answers of a run come to: quality by task, and speed, both beside the row that each is compared with."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from deployments.evaluation.answers import Answer, Key
from deployments.evaluation.config import Evaluation, Row
from deployments.evaluation.metrics.answers import f1, words
from deployments.evaluation.run import Asked, Ran
from deployments.evaluation.statistics import (
    Interval,
    mcnemar_test,
    mean_interval,
    paired_difference,
    paired_ratio,
    permutation_test,
    questions_needed,
)


@dataclass(frozen=True)
class Comparison:
    """A row's quality beside its baseline's, on the ``questions`` that both answered.

    ``gain`` is the mean difference with its 95% interval. ``p`` is McNemar's exact test's where answers are right or
    wrong, else the permutation test's. ``needed`` questions would tell a difference of the seen size (80% power).
    """

    questions: int
    gain: Interval
    p: float
    needed: int | None


@dataclass(frozen=True)
class Quality:
    """A row's main metric in a task, its mean with the 95% interval; ``groups`` is (questions, mean) by group.

    ``failed`` questions have no answer, and ``unscored`` ones no score: a judge's verdict is missing.
    """

    task: str
    metric: str
    best: float
    row: str
    temperature: float
    questions: int
    mean: Interval | None
    against: Comparison | None
    failed: int
    unscored: int
    groups: dict[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """What tables multiply the metric with: shares are shown as percents."""
        return 100.0 if self.best == 1 else 1.0


@dataclass(frozen=True)
class Speed:
    """How fast a row is in a task, or over all tasks where ``task`` is "".

    ``reading_s`` is the mean time before the first round, retrieval included, where both this row and its baseline read
    the prompt. An answer has ``tokens`` in the mean; ``tokens_per_second`` is that of decoding alone. ``speedup`` is
    the geometric mean of the questions' ratios to the baseline, with its interval. ``clock`` says who measured: the
    engine's rounds, or the client.
    """

    task: str
    row: str
    temperature: float
    answers: int
    reading_s: float | None
    readings: int
    tokens_per_second: float | None
    speedup: Interval | None
    acceptance: float | None
    tokens: float
    origins: dict[str, int]
    fallbacks: dict[str, int]
    clock: str

    @property
    def seconds(self) -> float:
        """For an answer of ``tokens`` about a document that is not read yet."""
        return (self.reading_s or 0.0) + (self.tokens / self.tokens_per_second if self.tokens_per_second else 0.0)


@dataclass(frozen=True)
class Summary:
    evaluation: Evaluation
    ran: Ran
    quality: list[Quality]
    speed: list[Speed]

    def as_object(self) -> dict[str, Any]:
        """What summary.json holds; intervals are objects with `value`, `low` and `high`."""
        return {
            "evaluation": self.evaluation.model_dump(mode="json", exclude_defaults=True),
            "ran": asdict(self.ran),
            "quality": [_plain(asdict(each)) for each in self.quality],
            "speed": [_plain(asdict(each)) for each in self.speed],
        }


def summarize(evaluation: Evaluation, asked: Sequence[Asked], answers: Iterable[Answer], ran: Ran) -> Summary:
    """The summary of the answers to what ``evaluation`` asks; others are left aside."""
    found = _with_agreement(evaluation, {answer.key: answer for answer in answers})
    rows = [row for row in evaluation.rows if row.name not in ran.left_out]
    quality, speed = [], []
    for temperature in evaluation.temperatures:
        for each in asked:
            values = {row.name: _values(each, row, temperature, found) for row in rows}
            quality += [_quality(each, row, temperature, values, evaluation.baseline_of(row), found) for row in rows]
        for task, part in {"": asked, **{each.choice.label: [each] for each in asked}}.items():
            speed += [_speed(task, part, row, temperature, evaluation.baseline_of(row), found) for row in rows]
    return Summary(evaluation, ran, quality, speed)


def _with_agreement(evaluation: Evaluation, found: dict[Key, Answer]) -> dict[Key, Answer]:
    """Each answer with the score `agreement`: the F1 of its words with those of its baseline's answer."""
    baselines = {row.name: (evaluation.baseline_of(row) or row).name for row in evaluation.rows}
    agreeing = {}
    for key, answer in found.items():
        other = found.get(key._replace(row=baselines.get(key.row, "")))
        if other is not None and answer.error is None and other.error is None:
            same = f1(answer.text, [other.text]) if words(other.text) else float(not words(answer.text))
            answer = replace(answer, scores=answer.scores | {"agreement": same})
        agreeing[key] = answer
    return agreeing


def _values(asked: Asked, row: Row, temperature: float, found: dict[Key, Answer]) -> dict[str, float]:
    """The main metric of each item all of whose questions have it, by the item's name."""
    items: defaultdict[str, list[float | None]] = defaultdict(list)
    for question in asked.of(row):
        answer = found.get(Key(asked.choice.label, question.id, row.name, temperature))
        score = answer.scores.get(asked.task.metric) if answer else None
        items[f"item {question.item}" if question.item else f"question {question.id}"].append(score)
    return {
        name: asked.task.combine([score for score in scores if score is not None])
        for name, scores in items.items()
        if None not in scores
    }


def _quality(
    asked: Asked,
    row: Row,
    temperature: float,
    values: dict[str, dict[str, float]],
    baseline: Row | None,
    found: dict[Key, Answer],
) -> Quality:
    own = values[row.name]
    answers = [
        answer
        for question in asked.of(row)
        if (answer := found.get(Key(asked.choice.label, question.id, row.name, temperature)))
    ]
    grouped: defaultdict[str, list[float]] = defaultdict(list)
    for question in asked.of(row):
        name = f"item {question.item}" if question.item else f"question {question.id}"
        if question.group and name in own:
            grouped[question.group].append(own[name])
    failed = sum(answer.error is not None for answer in answers)
    return Quality(
        task=asked.choice.label,
        metric=asked.task.metric,
        best=asked.task.best,
        row=row.name,
        temperature=temperature,
        questions=len(own),
        mean=mean_interval(list(own.values())) if own else None,
        against=_compared(own, values.get(baseline.name, {})) if baseline else None,
        failed=failed,
        unscored=sum(asked.task.metric not in answer.scores for answer in answers) - failed,
        groups={group: (len(scores), sum(scores) / len(scores)) for group, scores in sorted(grouped.items())},
    )


def _compared(own: dict[str, float], others: dict[str, float]) -> Comparison | None:
    both = [name for name in own if name in others]
    if not both:
        return None
    ours, theirs = [own[name] for name in both], [others[name] for name in both]
    are_binary = {*ours, *theirs} <= {0.0, 1.0}
    return Comparison(
        questions=len(both),
        gain=paired_difference(ours, theirs),
        p=mcnemar_test(ours, theirs) if are_binary else permutation_test(ours, theirs),
        needed=questions_needed(ours, theirs) if len(both) > 1 else None,
    )


def _speed(
    task: str,
    asked: Sequence[Asked],
    row: Row,
    temperature: float,
    baseline: Row | None,
    found: dict[Key, Answer],
) -> Speed:
    pairs: list[tuple[Answer, Answer | None]] = []
    for each in asked:
        for question in each.of(row):
            own = found.get(Key(each.choice.label, question.id, row.name, temperature))
            if own is None or own.error is not None:
                continue
            name = baseline.name if baseline else ""
            other = found.get(Key(each.choice.label, question.id, name, temperature))
            pairs.append((own, other if other and other.error is None else None))
    answers = [own for own, _ in pairs]
    read = [own.reading_s for own, other in pairs if own.has_read and (baseline is None or (other and other.has_read))]
    rates = [
        (_rate(own), _rate(other))
        for own, other in pairs
        if other and own.decoded and own.decode_s and other.decoded and other.decode_s
    ]
    seconds = sum(answer.decode_s for answer in answers)
    drafted = sum(answer.drafted for answer in answers)
    return Speed(
        task=task,
        row=row.name,
        temperature=temperature,
        answers=len(answers),
        reading_s=sum(read) / len(read) if read else None,
        readings=len(read),
        tokens_per_second=sum(answer.decoded for answer in answers) / seconds if seconds else None,
        speedup=paired_ratio([own for own, _ in rates], [other for _, other in rates]) if rates else None,
        acceptance=sum(answer.accepted for answer in answers) / drafted if drafted else None,
        tokens=sum(answer.decoded for answer in answers) / len(answers) if answers else 0.0,
        origins=dict(sum((Counter(answer.origins) for answer in answers), Counter())),
        fallbacks=dict(Counter(answer.fallback for answer in answers if answer.fallback)),
        clock="client" if any(answer.is_clocked_here for answer in answers) else "engine",
    )


def _rate(answer: Answer) -> float:
    return answer.decoded / answer.decode_s


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """``fields`` with each interval as an object, rounded."""

    def plain(value: Any) -> Any:
        if isinstance(value, Interval):
            return {name: round(number, 6) for name, number in value._asdict().items()}
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items()}
        return round(value, 6) if isinstance(value, float) else value

    return {name: plain(value) for name, value in fields.items()}
