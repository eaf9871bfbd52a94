"""What names, options, limits and files of tasks mean, and what wrong ones are told."""

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from words import Words, asked, write

from deployments.evaluation.task import EvaluationError, TaskSettings, chosen
from deployments.evaluation.tasks import TASKS, make_task


def test_a_limit_draws_by_the_seed_and_a_lower_one_draws_of_the_same():
    names = [f"q{i}" for i in range(100)]
    few, more, other = (
        chosen(names, str, TaskSettings(Words(), limit=limit, seed=seed)) for limit, seed in ((10, 0), (30, 0), (10, 1))
    )
    assert set(few) < set(more) and len(few) == 10 and len(more) == 30
    assert few == [name for name in names if name in few]  # in their order
    assert few != other
    assert chosen(names, str, TaskSettings(Words())) == names


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "there is none of this name; there are longbench_v2, "),
        ("nq:depth=2", "depth"),
        ("nq:deep=1", "deep"),
        ("nq:depth", "NAME=VALUE"),
        ("qmsum:queries=some", "queries"),
        ("mtbench101:turns=few", "turns"),
    ],
)
def test_wrong_specs_name_what_is_wrong(spec, message):
    with pytest.raises(EvaluationError, match=message):
        make_task(spec)


@pytest.mark.parametrize(
    ("spec", "content", "message"),
    [
        ("qmsum", None, "no qmsum_test.jsonl"),
        ("qmsum", "", "empty"),
        ("qmsum", "{", "line 1: it is no JSON"),
        ("qmsum", '{"meeting_transcripts": []}', "record 1: it has no field general_query_list, specific_query_list"),
    ],
)
def test_wrong_files_name_what_is_wrong(tmp_path, spec, content, message):
    if content is not None:
        (tmp_path / "qmsum_test.jsonl").write_text(content)
    with pytest.raises(EvaluationError, match=message):
        asked(spec, tmp_path)


def test_formats_that_are_none_are_refused(tmp_path):
    for name, task, content in (
        ("xquad.en.json", "xquad_en", '{"data": [{"paragraphs": [{}]}]}'),
        ("loogle_longdep_qa.jsonl", "loogle_long", '{"input": "a", "title": "t", "qa_pairs": "[{"}'),
        ("nq_open_oracle.jsonl", "nq", '{"question": "q", "answers": ["a"], "ctxs": [{"title": "t", "text": "x"}]}'),
        ("longbook_choice_eng.jsonl", "infinitebench_mc", '{"id": 1, "context": "c", "answer": "a", "options": ["b"]}'),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(EvaluationError, match=r"format|list of questions|gold|four options"):
            asked(task, tmp_path)


def test_a_task_without_data_says_how_to_give_it():
    with pytest.raises(EvaluationError, match=r"--data \(qmsum_test.jsonl or test.jsonl, or its folder\)"):
        asked("qmsum")
    with pytest.raises(EvaluationError, match="--from-hub"):
        asked("longbench_v2")


def test_the_hub_is_asked_only_where_that_is_allowed(tmp_path, monkeypatch):
    row = dict.fromkeys(("_id", "difficulty", "length", "question", "answer", "context"), "x")
    path = write(tmp_path / "data.json", [row | {f"choice_{letter}": letter for letter in "ABCD"}])
    calls = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *args, **more: calls.append((args, more)) or str(path)
    )
    assert len(asked("longbench_v2", from_hub=True)) == 1
    assert len(asked("longbench_v2", path, from_hub=True)) == 1  # a file goes before the hub
    assert calls == [(("THUDM/LongBench-v2", "data.json"), {"repo_type": "dataset"})]

    def refuse(*args, **more):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(EvaluationError, match="xinrongzhang2022/InfiniteBench could not be downloaded: no connection"):
        asked("infinitebench_qa", from_hub=True)


def test_every_task_has_a_name_a_metric_and_a_scale():
    for name in TASKS:
        task = make_task(name)
        assert task.name == name and task.metric and task.best in (1, 10)
        assert task.combine([0.25, 0.75]) == (0.25 if name == "mtbench101" else 0.5)
    assert make_task("nq:depth=0.5").name == "nq:depth=0.5"
