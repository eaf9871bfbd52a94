"""A run asks everything once, in an order in which what was read serves all rows, and goes on after a kill."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faked import FakeRunner, Silent, Words, evaluation, run

from deployments.evaluation.answers import FILE, AnswersFile, read_answers
from deployments.evaluation.estimate import Cell, Estimate
from deployments.evaluation.run import Asked, plan
from deployments.evaluation.runner import Ask, Reply
from deployments.evaluation.tables import notes
from deployments.evaluation.task import EvaluationError, Question
from rapid.errors import InvalidRequest, Overloaded, RapidError

CHILD = """
import asyncio, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from faked import FakeRunner, Silent, evaluation, run

def wait():
    print("asks", flush=True)
    sys.stdin.readline()

told = lambda answer: print("wrote", *answer.key, flush=True)
asked_for = evaluation(temperatures=[0.0, 0.3])
asyncio.run(run(asked_for, Path(sys.argv[1]), FakeRunner(wait), Silent(told)))
print("ended", flush=True)
"""


def without_times(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name != "ran"}


def test_a_run_that_is_killed_twice_loses_nothing_and_asks_nothing_twice(tmp_path: Path) -> None:
    asked_for = evaluation(temperatures=[0.0, 0.3])
    undisturbed = asyncio.run(run(asked_for, tmp_path / "undisturbed", FakeRunner()))
    folder = tmp_path / "killed"
    written: list[str] = []
    for num_answers in (5, 9, None):
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, folder, Path(__file__).parent],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        ) as child:
            assert child.stdin is not None and child.stdout is not None
            left = num_answers
            for line in child.stdout:
                if line.startswith("wrote"):
                    written.append(line)
                if line.startswith("asks"):
                    if left == 0:
                        break  # in the middle of an answer
                    left = None if left is None else left - 1
                    child.stdin.write("\n")
                    child.stdin.flush()
            if num_answers is not None:
                child.send_signal(signal.SIGKILL)
        if num_answers is not None:  # as if the kill had come in the middle of a line
            with (folder / FILE).open("ab") as file:
                file.write(b'{"task": "words", "question": "q')
    assert len(written) == 36 and set(Counter(written).values()) == {1}
    answers = read_answers(folder)
    assert Counter(answer.key for answer in answers) == Counter(a.key for a in read_answers(tmp_path / "undisturbed"))
    after = asyncio.run(run(asked_for, folder, FakeRunner()))
    assert without_times(after.as_object()) == without_times(undisturbed.as_object())


def test_a_whole_run_is_not_asked_again_and_a_longer_one_asks_the_rest(tmp_path: Path) -> None:
    runner = FakeRunner()
    asyncio.run(run(evaluation(), tmp_path, runner))
    assert len(runner.asked) == 18
    asyncio.run(run(evaluation(), tmp_path, runner))
    assert len(runner.asked) == 18
    watcher = Silent()
    asyncio.run(run(evaluation(temperatures=[0, 0.5]), tmp_path, runner, watcher))
    assert len(runner.asked) == 36 and watcher.began == [(36, 18)]


@pytest.mark.parametrize("change", [{"seed": 1}, {"context_tokens": 500}, {"systems": {"here": {"target_bits": 4}}}])
def test_answers_of_another_run_are_not_mixed_in(tmp_path: Path, change: dict[str, Any]) -> None:
    asyncio.run(run(evaluation(), tmp_path, FakeRunner()))
    with pytest.raises(EvaluationError, match="other settings: choose another --output"):
        asyncio.run(run(evaluation(**change), tmp_path, FakeRunner()))


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    first = AnswersFile.open(tmp_path)
    refused = pytest.raises(EvaluationError, match="another run writes")
    with first, refused, AnswersFile.open(tmp_path):
        pass


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    asyncio.run(run(evaluation(), tmp_path, FakeRunner()))
    path = tmp_path / FILE
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "{}\n", *lines[1:]]))
    with pytest.raises(EvaluationError, match="line 2: is damaged"):
        read_answers(tmp_path)


def test_seeds_are_of_question_row_and_temperature(tmp_path: Path) -> None:
    first, second = FakeRunner(), FakeRunner()
    asyncio.run(run(evaluation(temperatures=[0, 0.3]), tmp_path / "a", first))
    asyncio.run(run(evaluation(temperatures=[0, 0.3]), tmp_path / "b", second))
    seeds = [ask.seed for ask in first.asked]
    assert seeds == [ask.seed for ask in second.asked] and len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_documents_questions_stand_together_and_a_rows_first_of_each_is_known() -> None:
    asked_for = evaluation(unread=1)
    asked = Asked(asked_for.tasks[0], Words(), list(Words().questions()))
    probes, others = plan(asked_for, [asked], "here")
    assert [work.question.id for work in probes[::3]] == ["q0", "q1", "q2"]
    assert [work.question.id for work in others[::3]] == ["q3", "q4", "q5"]
    kinds = [work.kind for work in [*probes, *others]]
    # The first question is read by each row for itself. Then a document is new to each row once: the first row reads it
    # for all, and the first that retrieves embeds it.
    assert kinds == ["unread"] * 3 + ["new"] * 3 + ["known"] * 3 + ["new"] * 3 + ["known"] * 6


def test_the_document_that_a_row_retrieves_from_is_new_to_it_once() -> None:
    rows = [{"name": "LC"}, {"name": "whole", "rapid": {"strategy": "rapid"}, "retrieve_from": "whole"}]
    asked_for = evaluation(rows=rows, unread=0)
    questions = [replace(question, whole="all of the book", document=question.id) for question in Words().questions()]
    probes, others = plan(asked_for, [Asked(asked_for.tasks[0], Words(), questions)], "here")
    kinds = {name: [work.kind for work in [*probes, *others] if work.row.name == name] for name in ("LC", "whole")}
    assert kinds == {"LC": ["new"] * 6, "whole": ["new"] + ["known"] * 5}


def test_a_row_with_a_limit_is_asked_questions_that_lie_evenly() -> None:
    asked_for = evaluation(rows=[{"name": "LC", "limit": 3, "rapid": {"strategy": "autoregressive"}}])
    asked = Asked(asked_for.tasks[0], Words(), list(Words().questions()))
    assert [question.id for question in asked.of(asked_for.rows[0])] == ["q0", "q2", "q4"]


def test_a_row_without_a_question_is_named(tmp_path: Path) -> None:
    rows = [{"name": "LC"}, {"name": "whole", "rapid": {"strategy": "rapid"}, "retrieve_from": "whole"}]
    summary = asyncio.run(run(evaluation(rows=rows), tmp_path, FakeRunner()))
    assert any("No question could be asked of whole" in note for note in notes(summary))


def test_unrelated_passages_come_from_another_document() -> None:
    rows = [{"name": "LC", "rapid": {"strategy": "rapid"}, "retrieve_from": "unrelated"}]
    asked_for = evaluation(rows=rows)
    asked = Asked(asked_for.tasks[0], Words(), list(Words().questions()))
    for question in asked.questions:
        source = asked.source(question, asked_for.rows[0])
        assert source.startswith("Document") and source.split(".")[0] not in question.messages[0]["content"]


class Failing(FakeRunner):
    def __init__(self, error: RapidError, times: int) -> None:
        super().__init__()
        self._error, self._left = error, times

    async def answer(self, ask: Ask) -> Reply:
        if self._left and ask.query == "Question 2?":
            self._left -= 1
            raise self._error
        return await super().answer(ask)


def test_a_question_that_is_refused_is_noted_and_a_server_that_fails_ends_the_run(tmp_path: Path) -> None:
    refusing = Failing(InvalidRequest("too long"), 1)
    summary = asyncio.run(run(evaluation(), tmp_path / "refused", refusing))
    (failed,) = [answer for answer in read_answers(tmp_path / "refused") if answer.error]
    assert failed.error == "invalid_request: too long" and failed.scores == {}
    lc = next(q for q in summary.quality if q.row == failed.row)
    assert (lc.questions, lc.failed) == (5, 1)

    with pytest.raises(RapidError, match="gone") as raised:
        asyncio.run(run(evaluation(), tmp_path / "failed", Failing(RapidError("gone"), 1)))
    assert type(raised.value) is RapidError
    assert len(read_answers(tmp_path / "failed")) == 6  # what was answered before stays


def test_a_busy_server_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.evaluation.run._PAUSES_S", (0.0, 0.0))
    asyncio.run(run(evaluation(), tmp_path / "a", Failing(Overloaded("later"), 2)))
    assert len(read_answers(tmp_path / "a")) == 18
    with pytest.raises(Overloaded):
        asyncio.run(run(evaluation(), tmp_path / "b", Failing(Overloaded("later"), 99)))


class Crowded(FakeRunner):
    def __init__(self) -> None:
        super().__init__()
        self._now = self.most = 0

    async def answer(self, ask: Ask) -> Reply:
        self._now += 1
        self.most = max(self.most, self._now)
        for _ in range(10):
            await asyncio.sleep(0)
        self._now -= 1
        return await super().answer(ask)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_concurrency_is_bounded(tmp_path: Path, concurrency: int) -> None:
    runner = Crowded()
    asyncio.run(run(evaluation(concurrency=concurrency), tmp_path, runner))
    assert runner.most == concurrency and len(read_answers(tmp_path)) == 18


class Cot(Words):
    def questions(self, settings: Any = None) -> list[Question]:
        from deployments.evaluation.task import FollowUp

        def then(first: str) -> tuple[dict[str, str], ...]:
            return ({"role": "user", "content": f"You said {first}. So?"},)

        return [replace(question, then=FollowUp(then, 3)) for question in super().questions()]


def test_the_second_calls_answer_is_scored(tmp_path: Path) -> None:
    runner = FakeRunner()
    asyncio.run(run(evaluation(), tmp_path, runner, task=Cot()))
    assert len(runner.asked) == 36
    assert runner.asked[1].max_tokens == 3 and runner.asked[1].messages[0]["content"].startswith("You said")
    assert all(answer.first for answer in read_answers(tmp_path))


def test_what_is_left_is_the_sum_of_its_cells() -> None:
    def cell(row: str, temperature: float, kind: Any) -> Cell:
        return Cell("nq", row, "rapid" if row == "R" else "rag", temperature, kind)

    estimate = Estimate([cell("R", 0, "known")] * 3 + [cell("R", 0.3, "known")] * 2 + [cell("G", 0, "new")])
    assert estimate.left_s() is None
    estimate.learn(cell("R", 0, "known"), 2.0)
    assert estimate.left_s() == 3 * 2 + 2 * 2 + 2  # nothing nearer is known
    estimate.learn(cell("R", 0.3, "known"), 4.0)
    estimate.learn(cell("G", 0, "known"), 10.0)
    assert estimate.left_s() == 3 * 2 + 2 * 4 + 10
    estimate.finish(cell("R", 0, "known"))
    assert estimate.left_s() == 2 * 2 + 2 * 4 + 10


def test_the_estimate_is_made_of_the_first_questions(tmp_path: Path) -> None:
    watcher = Silent()
    summary = asyncio.run(run(evaluation(), tmp_path, FakeRunner(), watcher))
    assert len(watcher.estimated) == 1 and summary.ran.estimated_s == watcher.estimated[0]
    # Another system may be slower than the first: its first questions are waited for too, and the estimate said again.
    rows = [{"name": "LC"}, {"name": "slow", "system": "slow"}]
    asked_for = evaluation(rows=rows, systems={"here": {}, "slow": {"url": "http://slow/v1"}})
    watcher = Silent()
    summary = asyncio.run(run(asked_for, tmp_path / "two", FakeRunner(), watcher))
    assert len(watcher.estimated) == 2 and summary.ran.estimated_s == watcher.estimated[0]
    assert watcher.left[-1] == 0


def test_the_file_is_json_of_lines(tmp_path: Path) -> None:
    asyncio.run(run(evaluation(), tmp_path, FakeRunner()))
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert {"text", "scores", "origins", "statistics", "passages", "seed"} <= set(lines[0])
