"""What `make load` makes of answers: a benchmark that calls everything right would show nothing."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.clients import Asked, Checker, Kind, Question
from benchmarks.load import fairness, percentiles, row

WHALES, OCEANS = Question(None, "What is a whale?"), Question(None, "Name three oceans.")
ALONE = {
    WHALES: "A whale is a large animal that lives in the sea.",
    OCEANS: "The Pacific, the Atlantic and the Arctic.",
}


def asked(text: str, kind: Kind = "short", question: Question = WHALES, client: int = 0, **more: Any) -> Asked:
    fields = {"status": 200, "is_complete": kind != "cancelled", "tokens": 5, "first_s": 1.0, "last_s": 3.0} | more
    return Asked(client, kind, question, started=0.0, text=text, **fields)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (asked(ALONE[WHALES]), "identical"),
        (asked("A whale is", "cancelled"), "identical"),
        (asked("A whale is a large mammal.", "slow"), "diverged"),
        (asked(ALONE[OCEANS]), "mixed_up"),
        (asked("The Pacific, the Atlantic", "cancelled"), "mixed_up"),
        (asked("A whale is", is_complete=False), "lost"),
        (asked("Ishmael.", "new", Question(9, "Who?")), "not_compared"),
    ],
)
def test_each_answer_is_compared_with_the_one_got_alone(answer: Asked, verdict: str) -> None:
    checker = Checker("")
    checker.alone.update(ALONE)
    counts = checker.judge([answer])
    assert {name for name in ("identical", "diverged", "mixed_up", "lost", "not_compared") if counts[name]} == {verdict}


def test_a_refused_request_is_neither_lost_nor_compared() -> None:
    counts = Checker("").judge([asked("", status=429, is_complete=False)])
    assert (counts["lost"], counts["checked"], counts["not_compared"]) == (0, 0, 0)


def test_a_client_that_got_nothing_counts_in_fairness() -> None:
    served = [asked("a", client=0), asked("a", client=0), asked("", client=1, status=429, is_complete=False)]
    assert fairness(served) == {"jain": 0.5, "fewest": 0, "most": 2}


def test_times_are_of_answers_that_came() -> None:
    seen = row([asked("a"), asked("", status=429, is_complete=False, tokens=0, first_s=None, last_s=None)], clients=1)
    assert seen["statuses"] == {"200": 1, "429": 1}
    assert seen["per_token_s"] == {"p50": 0.5, "p95": 0.5}
    assert percentiles([]) is None
    assert percentiles([1.0] * 94 + [9.0] * 6) == {"p50": 1.0, "p95": 9.0}
