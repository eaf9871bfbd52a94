"""What `make load` makes of answers: a benchmark that calls everything right would show nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.clients import Asked, Kind, Question
from benchmarks.common.replay import Checker, Replay
from benchmarks.load import fairness, percentiles, row
from rapid.engine.engine import Engine
from rapid.models.loader import load_model

WHALES, OCEANS = Question(None, "What is a whale?"), Question(None, "Name three oceans.")
ALONE = "A whale is a large animal"


def asked(text: str, kind: Kind = "short", question: Question = WHALES, client: int = 0, **more: Any) -> Asked:
    fields = {"status": 200, "is_complete": kind != "cancelled", "tokens": 5, "first_s": 1.0, "last_s": 3.0} | more
    written = [word.encode() for word in text.split()]
    return Asked(client, kind, question, started=0.0, text=text, written=written, **fields)


class Margins:
    """Says how far an answer is from the likeliest, by its first word."""

    def margin(self, prompt: str, answer: Asked) -> float:
        return {b"Likeliest": 0.0, b"Nearly": 0.25}.get(answer.written[0], 9.0)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (asked(ALONE), "identical"),
        (asked("A whale is", "cancelled"), "identical"),
        (asked("A whale is"), "mixed_up"),
        (asked("The Pacific", "cancelled"), "mixed_up"),
        (asked("Likeliest all the way", "slow"), "identical"),
        (asked("Nearly the same"), "near_ties"),
        (asked("Nearly the same", "new", Question(8, "Who?")), "near_ties"),
        (asked("The Pacific", "slow"), "mixed_up"),
        (asked("A whale is", is_complete=False), "lost"),
    ],
)
def test_an_answer_is_as_alone_or_replayed(answer: Asked, verdict: str) -> None:
    checker = Checker("")
    checker.alone[WHALES] = asked(ALONE)
    counts = checker.judge([answer], Margins(), new=1)
    verdicts = ("identical", "near_ties", "mixed_up", "lost", "not_compared")
    assert {name for name in verdicts if counts[name]} == {verdict}
    assert checker.judge([answer, answer], Margins(), new=0)["replayed"] <= 1


def test_a_replay_tells_an_answer_to_its_own_prompt_from_another(smollm: Path) -> None:
    engine = Engine(load_model(str(smollm), dtype="bfloat16"), kv_bytes=2**26)
    try:
        replay, other = Replay(engine, str(smollm)), "Count from one to ten."
        answer = asked("", question=Question(None, "What is the capital of France?"), finish="length")
        answer.written = [b"The", b" capital", b" of", b" France", b" is", b" Paris"]
        assert replay.margin(answer.question.prompt, answer) < 1 < 3 < replay.margin(other, answer)
    finally:
        engine.shutdown()


def test_a_refused_request_is_neither_lost_nor_compared() -> None:
    counts = Checker("").judge([asked("", status=429, is_complete=False)], Margins(), new=1)
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
