"""How answers are judged, and what of an unfinished run counts."""

import json
from pathlib import Path
from typing import Any

from benchmarks.transfer import ARMS, interval, is_right, read_answers, summary


def test_an_answer_is_right_if_it_contains_an_expected_one() -> None:
    assert is_right("It was the May 18, 2018.", ["may 18 2018"])
    assert is_right("Wilhelm Röntgen", ["Curie", "The Röntgen"])
    assert not is_right("Romance", ["Roman"])
    assert not is_right("", ["a man"])


def test_the_interval_is_of_paired_differences() -> None:
    assert interval([0] * 50) == (0.0, 0.0)
    low, high = interval([1] * 30 + [0] * 70)
    assert 0.19 < low < 0.24 and 0.36 < high < 0.42


def test_only_questions_that_all_arms_answered_are_compared(tmp_path: Path) -> None:
    def row(number: int, arm: str, right: bool) -> dict[str, Any]:
        return {"key": [2048, "0.5", 0.0, number, arm], "right": right, "transfer": {"positions": 0}}

    answers = tmp_path / "answers.jsonl"
    rows = [row(number, arm, arm == "η auto" or number == 1) for number in range(4) for arm in ARMS]
    answers.write_text("\n".join(map(json.dumps, rows[:-1])), encoding="utf-8")  # the last one is missing
    found = {each["arm"]: each for each in summary(read_answers(answers))}
    assert found.keys() == ARMS.keys()
    assert all(each["questions"] == 3 for each in found.values())
    assert (found["target alone"]["right"], found["η auto"]["right"]) == (0.3333, 1.0)
    assert (found["target alone"]["gain"], found["η auto"]["gain"]) == (0.0, 0.6667)
