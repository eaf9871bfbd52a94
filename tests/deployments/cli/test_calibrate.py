from __future__ import annotations

import json
from pathlib import Path

import pytest

from deployments.cli.main import main
from retrieval.calibration import FILE, Observation


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Twenty questions about each of two texts."""
    rows = []
    for thing, place in (("lighthouse", "Lisbon"), ("bank", "Zurich")):
        sentences = [f"The {thing} number {i} of {place} was built in the year {1800 + i}." for i in range(20)]
        for i, sentence in enumerate(sentences):
            question = f"When was the {thing} number {i} of {place} built?"
            rows.append({"question": question, "context": " ".join(sentences), "passage": sentence})
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def config(tmp_path: Path, minilm_copy: Path) -> Path:
    file = tmp_path / "config.yaml"
    args = {"retriever": {"embedder": str(minilm_copy), "options": {"chunk_tokens": 64, "min_tokens": 64}}}
    file.write_text(json.dumps({"applications": [{"args": args}]}))
    return file


@pytest.fixture
def minilm_copy(tmp_path: Path) -> Path:
    """The embedder in a folder of its own, where something may be written."""
    from rapid.weights.embedded_models import local_path

    folder = tmp_path / "embedder"
    folder.mkdir()
    for path in Path(local_path("all-minilm-l6-v2")).iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def run(*args: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        main(["retrieval", "calibrate", *map(str, args)])
    assert isinstance(left.value.code, int)
    return left.value.code


def test_what_is_learned_is_kept_with_the_embedder_and_used(
    questions: Path, config: Path, minilm_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(questions, "--config", config) == 0
    out, err = capsys.readouterr()
    kept = json.loads((minilm_copy / FILE).read_text())
    assert json.loads(out) == kept and str(minilm_copy / FILE) in err
    assert 0.1 < kept["threshold"] < 0.9 and kept["report"]["held_out"]["auc"] > 0.8

    from deployments.builders import build_retriever
    from deployments.config import read_config

    settings = read_config(config)
    retriever = build_retriever(settings.retriever, None, settings.target.model)
    row = json.loads(questions.read_text().splitlines()[0])
    own = retriever.retrieve([row["context"]], row["question"], settings.retriever.options)
    other = retriever.retrieve([row["context"]], "Which salt do oysters like?", settings.retriever.options)
    assert own.confidence > 0.5 > other.confidence and own.reaches_threshold and not other.reaches_threshold


def test_a_dry_run_keeps_nothing(
    questions: Path,
    config: Path,
    minilm_copy: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = [Observation([0.1, 0.4 + i / 100], [0.0, 3.0], True, i > 5) for i in range(40)]
    other = [Observation([0.1, 0.2 + i / 100], [0.0, 1.0], False, False) for i in range(40)]
    monkeypatch.setattr("retrieval.calibration.observe", lambda *_: own + other)
    assert run(questions, "--config", config, "--dry-run") == 0
    assert json.loads(capsys.readouterr().out)["threshold"] == 0.4
    assert not (minilm_copy / FILE).exists()


def test_what_is_no_set_of_questions_is_one_line(
    questions: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few.jsonl"
    lines = questions.read_text().splitlines()
    few.write_text("\n".join([lines[0], lines[-1]]))
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(lines[0] + "\n{}\n")
    for file, code, message in (
        (few, 2, "at least 20"),
        (wrong, 1, "wrong.jsonl, line 2"),
        (tmp_path, 1, "cannot be read"),
    ):
        assert run(file, "--config", config) == code and message in capsys.readouterr().err
