"""What an embedder's scores mean: its threshold, and how sure a retrieval is, learned from known passages.

The cosines of one embedder say nothing about another's: all-MiniLM-L6-v2 gives unrelated texts 0.1, BGE-M3 gives them
0.35. `calibrate` learns both numbers from questions whose passages are known, each asked of its own text and of
another one. They are kept in the embedder's folder, as `rapid_retrieval.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import RetrievalError
from retrieval.options import RetrievalOptions

if TYPE_CHECKING:
    from retrieval.retriever import Retriever

FILE = "rapid_retrieval.json"
_LOST = 0.01  # share of answerable questions that may stay below the threshold
_LARGEST_MARGIN = 8.0  # of a few others that are alike by chance
_RIDGE = 0.01  # keeps the weights finite where a feature separates the questions


class Confidence(NamedTuple):
    """P(what the query needs is among the kept chunks) = sigmoid(top·s + margin·z + bias).

    s is the best chunk's score. z says by how many standard deviations of the other chunks it is above their mean. (Of
    all n chunks it could be no more than (n − 1)/√n, so that no short text would answer anything.)
    """

    top: float
    margin: float
    bias: float

    def of(self, scores: Sequence[float]) -> float:
        """The confidence, 0 to 1, in a search that gave all chunks of the context these `scores`."""
        if not scores:
            return 0.0
        top, margin = features(scores)
        x = self.top * top + self.margin * margin + self.bias
        return 1 / (1 + math.exp(-max(-50.0, min(50.0, x))))


@dataclass(frozen=True)
class Calibration:
    """An embedder's `threshold`, and the confidence by its cosines and by the sparse scores.

    `report` says from what they were learned and how well they hold.
    """

    threshold: float
    by_cosine: Confidence
    by_words: Confidence
    report: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The calibration as `load_calibration` reads it."""
        by = {name: getattr(self, name)._asdict() for name in ("by_cosine", "by_words")}
        return {"threshold": self.threshold, **by, "report": self.report}


# An embedder that nobody has calibrated: the paper's threshold, and the margin alone, which has no scale. Its weights
# are those that all-MiniLM-L6-v2 has without the best score.
UNCALIBRATED = Calibration(0.3, Confidence(0.0, 0.74, -2.51), Confidence(0.0, 0.53, -2.63))


# Learned by `python -m benchmarks.retrieval --part calibration`, with chunks of 256 tokens.
MEASURED = {
    "all-minilm-l6-v2": Calibration(0.26, Confidence(9.2858, 0.798, -6.1965), Confidence(0.4522, -0.1578, -3.2762)),
}


def calibration_of(model: str, folder: Path) -> Calibration:
    """The calibration in the embedder's `folder`; else the one measured for this model; else `UNCALIBRATED`.

    Raises RetrievalError when the file in the folder is none.
    """
    return load_calibration(folder) or MEASURED.get(Path(model).name.lower(), UNCALIBRATED)


def features(scores: Sequence[float]) -> tuple[float, float]:
    """(the best score, by how many standard deviations of the others it is above their mean)."""
    *others, top = np.sort(np.asarray(scores, dtype=np.float64))
    if len(others) < 2:
        return float(top), 0.0
    return float(top), float(min((top - np.mean(others)) / (np.std(others) + 1e-6), _LARGEST_MARGIN))


class KnownPassage(NamedTuple):
    """A question about `context`, whose answer stands at `passage`: (start, end) of the context."""

    question: str
    context: str
    passage: tuple[int, int]


class Observation(NamedTuple):
    """One search: the scores of all chunks, whether the text is the question's own, and whether its passage is kept."""

    cosines: Sequence[float]
    words: Sequence[float]
    is_own: bool
    is_found: bool


def read_questions(path: Path) -> list[KnownPassage]:
    """Read JSON lines with `question`, `context` and `passage`, which is a piece of the context, word for word.

    Raises RetrievalError naming the line that is none.
    """
    questions = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RetrievalError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, context, passage = (row[name] for name in ("question", "context", "passage"))
            start = context.find(passage)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RetrievalError(f"{path}, line {number}: needs strings question, context and passage") from error
        if start < 0 or not passage.strip() or not question.strip():
            raise RetrievalError(f"{path}, line {number}: the passage must be a piece of the context, word for word")
        questions.append(KnownPassage(question, context, (start, start + len(passage))))
    return questions


def observe(retriever: Retriever, questions: Sequence[KnownPassage], options: RetrievalOptions) -> list[Observation]:
    """Ask each question of its own context, and of the context of a question about another one.

    The vectors of the contexts stay in the retriever's store until that is closed. Raises RetrievalError when there is
    one context alone.
    """
    contexts = list(dict.fromkeys(each.context for each in questions))
    if len(contexts) < 2:
        raise RetrievalError("a calibration needs questions about two contexts at least")
    options = replace(options, method="hybrid", threshold=-1, keep=True)
    cut = [retriever.chunks([context], options) for context in contexts]
    observations = []
    for i, each in enumerate(questions):
        own = contexts.index(each.context)
        other = (own + 1 + i % (len(contexts) - 1)) % len(contexts)
        for asked in (own, other):
            chunks, context_tokens = cut[asked]
            kept = retriever.retrieve_from(chunks, context_tokens, each.question, options).chunks
            cosines, words = (
                retriever.search(chunks, each.question, replace(options, method=method)).scores
                for method in ("dense", "sparse")
            )
            is_found = any(c.start < each.passage[1] and each.passage[0] < c.end for c in kept)
            rows = range(len(chunks))
            observations.append(
                Observation(
                    [cosines.get(row, 0.0) for row in rows],
                    [words.get(row, 0.0) for row in rows],
                    asked == own,
                    asked == own and is_found,
                )
            )
    return observations


def calibrate(observations: Sequence[Observation]) -> Calibration:
    """Learn from the observations; every second one of each kind is held out for the report.

    The threshold is the highest that 99% of the questions about their own text reach.

    Raises ValueError when there are fewer than 20 questions about their own text, or about another one.
    """
    own = [each for each in observations if each.is_own]
    other = [each for each in observations if not each.is_own]
    if min(len(own), len(other)) < 20:
        raise ValueError(f"a calibration needs at least 20 questions about their own text and 20 about another, got "
                         f"{len(own)} and {len(other)}")  # fmt: skip
    learned = _learn([*own[::2], *other[::2]])
    held_out = [*own[1::2], *other[1::2]]
    confidences = np.array([learned.by_cosine.of(each.cosines) for each in held_out])
    found = np.array([each.is_found for each in held_out])
    reach = [max(each.cosines) >= learned.threshold for each in held_out]
    half = len(own[1::2])
    report = {
        "questions": len(own),
        "about_another_text": len(other),
        "found": round(float(np.mean([each.is_found for each in own])), 4),
        "held_out": {
            "reach_the_threshold": round(float(np.mean(reach[:half])), 4),
            "reach_it_in_another_text": round(float(np.mean(reach[half:])), 4),
            "confidence": round(float(confidences[:half].mean()), 4),
            "confidence_in_another_text": round(float(confidences[half:].mean()), 4),
            "auc": round(_auc(confidences, found), 4),
            "brier_score": round(float(((confidences - found) ** 2).mean()), 4),
        },
    }
    return replace(learned, report=report)


def load_calibration(folder: Path) -> Calibration | None:
    """The calibration that was kept in an embedder's folder; None if there is none.

    Raises RetrievalError when the file is there and is not one.
    """
    path = folder / FILE
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        by_cosine, by_words = (Confidence(**kept[name]) for name in ("by_cosine", "by_words"))
        calibration = Calibration(kept["threshold"], by_cosine, by_words, kept["report"])
        is_whole = all(math.isfinite(number) for number in (calibration.threshold, *by_cosine, *by_words))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RetrievalError(f"{path} is no calibration ({error}): delete it, or calibrate again") from error
    if not is_whole or not -1 <= calibration.threshold <= 1:
        raise RetrievalError(f"{path} is no calibration (a number is out of range): delete it, or calibrate again")
    return calibration


def save_calibration(calibration: Calibration, folder: Path) -> Path:
    """Keep a calibration in an embedder's folder, and return its path. Raises RetrievalError when it cannot be."""
    path = folder / FILE
    try:
        path.write_text(json.dumps(calibration.as_json(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RetrievalError(f"the calibration cannot be kept beside the embedder: {error}") from error
    return path


def _learn(observations: Sequence[Observation]) -> Calibration:
    tops = sorted(max(each.cosines) for each in observations if each.is_own)
    threshold = math.floor(tops[int(_LOST * len(tops))] * 100) / 100
    found = np.array([each.is_found for each in observations], dtype=np.float64)
    by_cosine = _fit(np.array([features(each.cosines) for each in observations]), found)
    by_words = _fit(np.array([features(each.words) for each in observations]), found)
    return Calibration(threshold, by_cosine, by_words)


def _fit(x: NDArray[np.float64], y: NDArray[np.float64]) -> Confidence:
    """Logistic regression by Newton's method."""
    x = np.column_stack([x, np.ones(len(x))])
    weights = np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -50, 50)))
        hessian = x.T @ (x * (p * (1 - p))[:, None]) + _RIDGE * np.eye(len(weights))
        weights += np.linalg.solve(hessian, x.T @ (y - p) - _RIDGE * weights)
    return Confidence(*(round(float(weight), 4) for weight in weights))


def _auc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """P(a positive has a higher score than a negative); 0.5 where there are only ones of a kind."""
    a, b = scores[positive], scores[~positive]
    if not len(a) or not len(b):
        return 0.5
    difference = a[:, None] - b[None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())
