"""What the tests of the core share."""

from collections.abc import Callable, Iterator

import pytest
from gate import Gate

from rapid.model import Model


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Model], Gate]]:
    """Puts gates before models' forward passes, and opens them after the test."""
    made: list[Gate] = []

    def make(model: Model) -> Gate:
        made.append(Gate(model, monkeypatch))
        return made[-1]

    yield make
    for gate in made:
        gate.open()
