"""How many tokens of a pass each task gets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from rapid.engine.scheduler import schedule

BUDGET = 128


def task(num_left: int, *, is_in_prompt: bool = True, num_rows: int = 0) -> Any:
    request = SimpleNamespace(table=SimpleNamespace(pages=[object()]), num_rows=num_rows)
    request.table.pages = [id(request)]
    return SimpleNamespace(request=request, num_left=num_left, is_in_prompt=is_in_prompt)


def lengths(*tasks: Any) -> list[int]:
    """The tokens of each task in the next pass."""
    given = {id(running): n for running, n in schedule(tasks, BUDGET)}
    return [given.get(id(one), 0) for one in tasks]


def test_a_long_prompt_has_what_others_leave() -> None:
    assert lengths(task(4000)) == [128]
    assert lengths(task(4000), task(1, is_in_prompt=False, num_rows=1), task(11, is_in_prompt=False)) == [116, 1, 11]
    assert lengths(task(4000), task(5000)) == [128, 0]


def test_a_pass_that_an_answer_waits_for_is_short() -> None:
    """Its prompt ends in this pass, or its first token comes of it. Other prompts that end are welcome."""
    assert lengths(task(4000), task(30)) == [32, 30]
    assert lengths(task(4000), task(1, num_rows=1)) == [32, 1]
    assert lengths(task(4000), task(30), task(40), task(5000)) == [32, 30, 40, 0]
    assert lengths(task(90), task(30)) == [90, 30]
    assert lengths(task(4000), task(120)) == [8, 120]


def test_rows_of_logits_come_from_one_pass() -> None:
    assert lengths(task(40, num_rows=20), task(90)) == [40, 32]
    assert lengths(task(130, num_rows=20)) == [110]
    assert lengths(task(200, num_rows=200)) == [200]
