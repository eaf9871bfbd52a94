"""What a run comes to: the summary by hand, tables, pictures, and a page on which strangers' text does nothing."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from faked import ROWS, FakeRunner, Words, evaluation, run

from deployments.evaluation.answers import Answer, read_answers
from deployments.evaluation.config import Evaluation
from deployments.evaluation.evaluate import write
from deployments.evaluation.plots import Line, Mark, bars, chart, dots, pictures, ticks
from deployments.evaluation.report import render
from deployments.evaluation.run import Asked, Ran
from deployments.evaluation.summary import Summary, summarize
from deployments.evaluation.tables import needed, notes, tables
from deployments.evaluation.task import Question

HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u2028\x00"


def answer(question: str, row: str, match: float, **more: Any) -> Answer:
    fields = {"text": "x", "scores": {"match": match}, "decoded": 10, "decode_s": 1.0, "drafted": 4, "accepted": 1}
    return Answer("words", question, row, 0.0, "run", 1, **fields | more)


def summary_of(answers: Iterable[Answer], asked_for: Evaluation | None = None, task: Words | None = None) -> Summary:
    asked_for, task = asked_for or evaluation(), task or Words()
    return summarize(asked_for, [Asked(asked_for.tasks[0], task, list(task.questions()))], answers, Ran())


def test_quality_is_compared_on_the_questions_that_both_answered() -> None:
    right = {"LC": [1, 0, 0, 0, 1, 0], "RAPID": [1, 1, 1, 0, 1]}
    summary = summary_of(answer(f"q{i}", row, score) for row, scores in right.items() for i, score in enumerate(scores))
    lc, rag, rapid = summary.quality
    assert lc.mean and lc.mean.value == pytest.approx(1 / 3) and lc.against is None
    assert rag.mean is None and rag.against is None and rag.questions == 0
    assert rapid.mean and rapid.mean.value == pytest.approx(0.8) and rapid.against
    assert rapid.against.questions == 5 and rapid.against.gain.value == pytest.approx(0.4)
    assert rapid.against.p == pytest.approx(0.5)  # McNemar's: two of two discordant pairs, 2 · (1/2)²
    assert lc.groups == {"even": (3, pytest.approx(2 / 3)), "odd": (3, 0.0)}


def test_an_item_counts_once_and_only_when_it_is_whole() -> None:
    class Turns(Words):
        def questions(self, settings: Any = None) -> list[Question]:
            return [replace(question, item=question.document) for question in super().questions()]

        def combine(self, scores: Any) -> float:
            return min(scores)

    scores = [1, 1, 0, 1, 1, 1]
    whole = summary_of((answer(f"q{i}", "LC", score) for i, score in enumerate(scores)), task=Turns())
    assert (whole.quality[0].questions, whole.quality[0].mean[0]) == (2, 0.5)  # type: ignore[index]
    part = summary_of((answer(f"q{i}", "LC", score) for i, score in enumerate(scores[:4])), task=Turns())
    assert (part.quality[0].questions, part.quality[0].mean[0]) == (1, 0.0)  # type: ignore[index]


def test_speed_is_that_of_all_tokens_and_the_speedup_of_pairs() -> None:
    answers = [answer("q0", "LC", 1), answer("q1", "LC", 1, decoded=30, has_read=True, reading_s=4.0)]
    answers += [answer("q0", "RAPID", 1, decode_s=0.5), answer("q1", "RAPID", 1, has_read=True, reading_s=5.0)]
    answers += [answer("q2", "RAPID", 1, has_read=True, reading_s=99.0)]  # the baseline has not read it
    speed = {s.row: s for s in summary_of(answers).speed if not s.task}
    assert speed["LC"].tokens_per_second == 20 and speed["LC"].reading_s == 4.0 and speed["LC"].speedup is None
    rapid = speed["RAPID"]
    assert rapid.reading_s == 5.0 and rapid.readings == 1 and rapid.tokens_per_second == pytest.approx(30 / 2.5)
    assert rapid.speedup and rapid.speedup.value == pytest.approx((2 * 1 / 3) ** 0.5)
    assert rapid.acceptance == 0.25 and rapid.seconds == pytest.approx(5.0 + 10 / 12)


def test_agreement_is_with_the_baselines_text() -> None:
    texts = {"LC": "the cat sat", "RAG": "a cat ran", "RAPID": "Cat sat!"}

    class Agreeing(Words):
        metric = "agreement"

    answers = [answer("q0", row, 1, text=text) for row, text in texts.items()]
    quality = {q.row: q.mean for q in summary_of(answers, task=Agreeing()).quality}
    assert quality["LC"] and quality["LC"].value == 1 and quality["RAPID"] and quality["RAPID"].value == 1
    assert quality["RAG"] and quality["RAG"].value == 0.5  # "cat" of two words each


@pytest.fixture
def fakes_summary(tmp_path: Path) -> Summary:
    rows = [*ROWS[:2], ROWS[2] | {"note": "a <b>note</b>"}]
    return asyncio.run(run(evaluation(rows=rows, temperatures=[0.0, 0.3]), tmp_path, FakeRunner()))


def test_tables_have_a_line_for_each_row_and_say_what_must_be_known(fakes_summary: Summary) -> None:
    first, second = tables(fakes_summary)
    assert first.header == ["", "words (match)", "prefill s", "tokens/s", "speedup", "acceptance"]
    assert [row[0].text for row in first.rows] == ["LC", "RAG", "RAPID"] and second.title == "Temperature 0.3"
    rapid = first.rows[2]
    assert rapid[1].text == "100.0" and rapid[3].text == "20.0" and rapid[4].text == "2.00×" and rapid[5].text == "50%"
    assert re.fullmatch(r"\+\d+\.\d\*? \[[+-]\d+\.\d, [+-]\d+\.\d\]", rapid[1].detail)
    assert "RAPID: a <b>note</b>" in notes(fakes_summary)
    assert all("questions to tell" in line for line in needed(fakes_summary)) and needed(fakes_summary)


class Reader(HTMLParser):
    """The tags of a page, with their attributes, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_text_is_only_text(tmp_path: Path) -> None:
    class Hostile(Words):
        def questions(self, settings: Any = None) -> list[Question]:
            return [
                replace(
                    question,
                    query=HOSTILE,
                    references=(HOSTILE,),
                    messages=({"role": HOSTILE, "content": HOSTILE},),
                    facts={HOSTILE: HOSTILE},
                )
                for question in super().questions()
            ]

    asked_for = evaluation(
        tasks=[{"name": "words", "as_name": HOSTILE}],
        rows=[{"name": HOSTILE, "note": HOSTILE, "rapid": {"strategy": "autoregressive"}}],
    )
    task = Hostile()
    asked = [Asked(asked_for.tasks[0], task, list(task.questions()))]
    answers = [
        Answer(
            HOSTILE,
            question.id,
            HOSTILE,
            0.0,
            "run",
            1,
            text=HOSTILE,
            first=HOSTILE,
            verdict=HOSTILE,
            scores={"match": 1.0},
            fallback=HOSTILE,
            origins={HOSTILE: 3},
            pieces=[(HOSTILE, HOSTILE)],
            passages=[],
            error=HOSTILE if question.id == "q5" else None,
        )
        for question in asked[0].questions
    ]
    ran = Ran({HOSTILE: {"name": HOSTILE}}, {HOSTILE: HOSTILE})
    page = render(summarize(asked_for, asked, answers, ran), asked, answers)
    reader = Reader()
    reader.feed(page)
    used = {tag for tag, _ in reader.tags}
    assert not used & {"script", "img", "iframe", "object", "a", "link", "form", "base"}
    assert all(not name.startswith("on") and name not in ("src", "href") for _, attrs in reader.tags for name in attrs)
    assert {attrs.get("class") for tag, attrs in reader.tags if tag == "span"} <= {
        "accepted", "lookup", "datastore", "self", "recovered", "bonus", "plain", "chosen",
    }  # fmt: skip
    assert "alert(1)" in reader.text
    policy = next(attrs["content"] for tag, attrs in reader.tags if "http-equiv" in attrs)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_a_question_shows_all_answers_with_their_origins_and_passages(tmp_path: Path) -> None:
    asked_for = evaluation(reported=2)
    summary = asyncio.run(run(asked_for, tmp_path, FakeRunner()))
    task = Words()
    page = render(summary, [Asked(asked_for.tasks[0], task, list(task.questions()))], read_answers(tmp_path))
    assert page.count('<div class="answer">') == 6 and page.count("passage of Question 0?") == 1
    assert '<span class="accepted">rig</span><span class="recovered">ht 0</span>' in page
    assert "LC, RAG, RAPID" in page and "4 of 8 drafted accepted" in page


def test_what_is_written_is_whole_although_text_is_no_text(tmp_path: Path) -> None:
    """A server may send half of a surrogate pair, which no file can hold."""
    from deployments.evaluation.answers import AnswersFile

    asked_for = evaluation()
    task = Words()
    asked = [Asked(asked_for.tasks[0], task, list(task.questions()))]
    with AnswersFile.open(tmp_path) as answers:
        answers.add(answer("q0", "LC", 1.0, text="a\ud800b"))
        write(summarize(asked_for, asked, answers.known.values(), Ran()), asked, answers, tmp_path)
    assert read_answers(tmp_path)[0].text == "a\ud800b"
    assert "a?b" in (tmp_path / "report.html").read_text()


def test_pictures_are_well_formed_and_escape_names() -> None:
    marks = [Mark(HOSTILE.replace("\x00", ""), 1.5, -2.0, 3.0), Mark("b", 0.0, 0.0, 0.0)]
    lines = [Line("<a>", [(256, 1.0, 0.5, 2.0), (512, 2.0, 1.0, 3.0)]), Line("b", [(256, 0.0, 0.0, 0.0)])]
    for picture in (dots("<t>", marks), bars("<t>", marks), chart("<t>", "<axis>", lines)):
        root = ElementTree.fromstring(picture)
        assert root.get("aria-label") == "<t>"
        assert not [each for each in root.iter() if each.tag.endswith("script")]


def test_a_picture_of_gains_shows_rows_with_enough_questions_and_whole_labels(tmp_path: Path) -> None:
    summary = asyncio.run(run(evaluation(), tmp_path, FakeRunner()))
    found = [q for q in summary.quality if q.against]
    asked = [40, 3, 12][: len(found)]
    quality = [replace(q, questions=n, row=f"{q.row}, {'long ' * 5}") for q, n in zip(found, asked, strict=True)]
    drawn = ElementTree.fromstring(pictures(replace(summary, quality=quality))["gains-t0"])
    labels = [text for text in drawn.iter() if text.get("text-anchor") == "end"]
    assert len(labels) == sum(n >= 10 for n in asked) and "of at least 10 questions" in str(drawn.get("aria-label"))
    assert all(float(text.get("x", 0)) >= 7 * len(text.text or "") for text in labels)


def test_a_line_stands_over_the_places_of_rows_or_of_tasks(tmp_path: Path) -> None:
    rows = [ROWS[0], *({"name": f"η {eta}", "line": "related", "at": eta, "rapid": {}} for eta in (1.0, 2.0))]
    rows = [row | {"rapid": row["rapid"] or {"strategy": "rapid"}} for row in rows]
    summary = asyncio.run(run(evaluation(rows=rows, axis="η"), tmp_path / "rows", FakeRunner()))
    drawn = pictures(summary)
    assert {"gains-t0", "speed-t0", "quality-t0", "tokens-a-second-t0", "acceptance-t0"} == set(drawn)
    assert ">related words</text>" in drawn["quality-t0"] and ">η</text>" in drawn["quality-t0"]
    tasks = [{"name": "words", "as_name": name, "at": at} for name, at in (("1K", 1000), ("2K", 2000))]
    summary = asyncio.run(run(evaluation(tasks=tasks, axis="tokens"), tmp_path / "tasks", FakeRunner()))
    assert all(f">{row['name']}</text>" in pictures(summary)["quality-t0"] for row in ROWS)


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 4), (0, 0.02), (-0.001, 350), (0, 9999)])
def test_ticks_are_few_round_numbers_in_the_range(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 3 <= len(found) <= 8 and low <= found[0] and found[-1] <= high + 1e-9
