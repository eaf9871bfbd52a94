"""What the benchmark of a storm counts: answers that never ended, and memory that grows."""

from __future__ import annotations

from typing import Any

from benchmarks.common.clients import KNOWN, Asked
from benchmarks.storm import by_age, by_minute, growth, row


def answer(**how: Any) -> Asked:
    asked = Asked(0, "short", KNOWN[0], 0.0, status=200)
    for name, value in how.items():
        setattr(asked, name, value)
    return asked


def test_an_answer_that_ends_with_a_reason_is_not_lost_and_one_that_just_ends_is() -> None:
    counted = row(
        [
            answer(is_complete=True),
            answer(error="a part of the service stopped"),
            answer(),
            answer(kind="cancelled"),
            answer(status=503, error="busy"),
        ]
    )
    assert {name: counted[name] for name in ("complete", "ended_with_an_error", "lost", "left")} == {
        "complete": 1,
        "ended_with_an_error": 1,
        "lost": 1,
        "left": 1,
    }
    assert counted["errors"] == {"a part of the service stopped": 1}


def test_growth_is_of_the_processes_that_lived_throughout() -> None:
    def sizes(minute: int) -> dict[str, float]:
        return {"coordinator": 100.0 + minute, "proxy": 50.0} | (
            {"engine 2": 500.0} if minute > 20 else {"engine 1": 400.0}
        )

    seen = [(30.0 * half, sizes(half // 2)) for half in range(60)]
    assert growth(seen) == {"coordinator": 10.0, "proxy": 0.0}
    assert by_minute(seen) == {"coordinator": [100.0 + minute for minute in range(30)], "proxy": [50.0] * 30}


def test_a_process_that_is_replaced_is_compared_with_others_of_its_age() -> None:
    def sizes(minute: float) -> dict[str, float]:
        generation = int(minute // 5)  # each takes 10 MiB more a minute, and begins anew
        return {f"engine {generation}": 100 + 10 * (minute % 5), "proxy 7": 1}

    seen = by_age([(6.0 * tenth, sizes(tenth / 10)) for tenth in range(300)])
    assert seen == {"engine": {"1 to 2 min": 114.5, "2 to 4 min": 129.5, "4 to 8 min": 144.5}}
