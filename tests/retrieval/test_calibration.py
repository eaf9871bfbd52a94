from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from retrieval import RetrievalError, RetrievalOptions, Retriever
from retrieval.calibration import (
    MEASURED,
    UNCALIBRATED,
    Confidence,
    Observation,
    calibrate,
    calibration_of,
    observe,
    read_questions,
    save_calibration,
)
from retrieval.store import ChunkStore


def simulated(truth: Confidence, n: int = 4000) -> list[Observation]:
    """Searches whose passages are found exactly as often as ``truth`` says."""
    rng = np.random.default_rng(0)
    observations = []
    for i in range(n):
        is_own = i % 2 == 0
        scores = np.append(rng.normal(0.2, 0.1, 30), rng.normal(0.65 if is_own else 0.45, 0.1))
        is_found = is_own and rng.random() < truth.of(list(scores))
        observations.append(Observation(list(scores), list(10 * scores), is_own, bool(is_found)))
    return observations


def test_what_is_learned_is_what_made_the_observations():
    """Own texts alone, so that the truth is one logistic function of the scores."""
    truth = Confidence(6.0, 0.5, -5.0)
    own = [each for each in simulated(truth, 20_000) if each.is_own]
    other = [each._replace(is_own=False) for each in own[:20]]
    learned = calibrate([*own, *other]).by_cosine
    for each in own[:20]:
        assert learned.of(each.cosines) == pytest.approx(truth.of(each.cosines), abs=0.05)


def test_the_report_is_of_what_was_held_out():
    observations = simulated(Confidence(20.0, 0.0, -8.0))
    learned = calibrate(observations)
    own = [max(each.cosines) for each in observations if each.is_own]
    assert np.mean([top >= learned.threshold for top in own]) == pytest.approx(0.99, abs=0.008)
    report = learned.report["held_out"]
    assert report["reach_the_threshold"] == pytest.approx(0.99, abs=0.01)
    assert report["reach_it_in_another_text"] < 0.9
    assert report["confidence"] > 2 * report["confidence_in_another_text"] and report["auc"] > 0.85
    assert report["confidence"] + report["confidence_in_another_text"] == pytest.approx(
        learned.report["found"], abs=0.05
    )
    assert report["brier_score"] < 0.15


def test_too_few_questions_are_refused():
    with pytest.raises(ValueError, match="at least 20"):
        calibrate(simulated(Confidence(1, 1, 1), 30))


@pytest.mark.parametrize("scores", [[], [0.0], [0.3, 0.3], [-1.0, 1.0], [1e6, 0.0]])
def test_a_confidence_is_a_probability(scores):
    for confidence in (UNCALIBRATED.by_cosine, Confidence(100, 100, -1), Confidence(-100, 0, 0)):
        assert 0 <= confidence.of(scores) <= 1


def test_a_short_text_can_be_as_sure_as_a_long_one():
    """The same chunk among 8 and among 80 others of the same kind."""
    confidence = MEASURED["all-minilm-l6-v2"].by_cosine
    short, long = (confidence.of([0.42, *[0.15, 0.25] * half]) for half in (4, 40))
    assert short == pytest.approx(long, abs=0.01) and short > 0.7
    assert confidence.of([0.25, *[0.15, 0.25] * 4]) < 0.1


def test_a_calibration_is_kept_with_its_embedder(tmp_path):
    learned = calibrate(simulated(Confidence(20.0, 0.0, -8.0)))
    assert calibration_of("some/embedder", tmp_path) == UNCALIBRATED
    assert calibration_of("/models/all-minilm-l6-v2", tmp_path) == MEASURED["all-minilm-l6-v2"]
    path = save_calibration(learned, tmp_path)
    assert calibration_of("/models/all-minilm-l6-v2", tmp_path) == learned
    for wrong in (
        "",
        "{}",
        path.read_text().replace('"top"', '"tip"'),
        json.dumps(learned.as_json() | {"threshold": 3}),
    ):
        path.write_text(wrong)
        with pytest.raises(RetrievalError, match=r"rapid_retrieval.json is no calibration"):
            calibration_of("some/embedder", tmp_path)
    with pytest.raises(RetrievalError, match="cannot be kept"):
        save_calibration(learned, tmp_path / "absent")


def test_questions_are_asked_of_their_own_text_and_of_another(embedder, tokenizer, tmp_path):
    contexts = [
        " ".join(f"The {thing} of {place} number {i} is known." for i in range(40))
        for thing, place in (("lighthouse", "Lisbon"), ("whale", "Nantucket"), ("bank", "Zurich"))
    ]
    rows = [
        {"question": f"whale of Nantucket number {i}?", "context": contexts[1], "passage": f"number {i} is"}
        for i in range(12)
    ] + [{"question": "the bank of Zurich", "context": contexts[2], "passage": "bank"}]
    rows.append({"question": "the lighthouse", "context": contexts[0], "passage": "lighthouse"})
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    retriever = Retriever(embedder, ChunkStore(dimension=embedder.dimension), tokenizer)
    options = RetrievalOptions(chunk_tokens=32, min_tokens=64)
    observations = observe(retriever, read_questions(file), options)
    assert len(observations) == 2 * len(rows)
    own, other = observations[::2], observations[1::2]
    assert all(each.is_own for each in own) and not any(each.is_own or each.is_found for each in other)
    assert np.mean([each.is_found for each in own]) > 0.5
    assert np.mean([max(each.cosines) for each in own]) > np.mean([max(each.cosines) for each in other]) + 0.2
    with pytest.raises(RetrievalError, match="two contexts"):
        observe(retriever, read_questions(file)[:3], replace(options))


@pytest.mark.parametrize(
    "row", ["no json", "[]", '{"question": "a", "context": "b"}', '{"question": "a", "context": "b", "passage": "c"}']
)
def test_a_line_that_is_no_question_is_named(tmp_path, row):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "a", "context": "b", "passage": "b"}\n' + row + "\n")
    with pytest.raises(RetrievalError, match=r"questions.jsonl, line 2"):
        read_questions(file)
    with pytest.raises(RetrievalError, match="cannot be read"):
        read_questions(tmp_path / "absent.jsonl")
