"""The table of popular clients: a row each, and a reason for what does not work."""

from __future__ import annotations

from benchmarks.clients.__main__ import table


def test_a_table_says_what_works_and_why_something_does_not() -> None:
    works, fails = {"feature": "chat", "ok": True}, {"feature": "tools", "ok": False, "error": "TypeError: x"}
    results = {
        "one": {"version": "one 1.0", "features": [works, fails]},
        "two": {"version": None, "features": []},
    }
    assert table(results).splitlines() == [
        "| client | chat | tools |",
        "| --- | --- | --- |",
        "| one 1.0 | yes | **no** |",
        "| two: not installed |  |  |",
        "",
        "* one, tools: TypeError: x",
    ]
