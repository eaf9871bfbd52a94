"""The table of strategies: every row can be used, and everything that names strategies reads the table."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rapid.drafters.interface import Drafter, drafter_class
from rapid.speculation.verification import RULES
from rapid.strategies import STRATEGIES, VERIFICATION_RULES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_row_names_drafters_that_can_be_told_apart(name: str) -> None:
    strategy = STRATEGIES[name]
    assert strategy.name == name and strategy.summary
    drafters = [drafter_class(reference) for reference in strategy.drafters]
    assert all(issubclass(drafter, Drafter) for drafter in drafters)
    assert len({drafter.label for drafter in drafters}) == len(drafters)
    # Only a drafter whose q is real can move the output.
    assert not strategy.transfers or any(drafter.sampled for drafter in drafters)


def test_every_verification_rule_has_a_function_and_a_summary() -> None:
    assert list(RULES) == list(VERIFICATION_RULES)


def test_the_readme_has_the_table() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", readme, re.MULTILINE)
    assert rows == [(strategy.name, strategy.summary) for strategy in STRATEGIES.values()]


def test_the_table_loads_no_library() -> None:
    code = "import sys, rapid.strategies; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert not {"torch", "numpy", "transformers"} & set(loaded.split())
