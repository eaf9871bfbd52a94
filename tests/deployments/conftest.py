"""Both embedded models, pulled before anything is said about what a command prints."""

from __future__ import annotations

import pytest

from rapid.catalog import entries, local_path


@pytest.fixture(scope="session", autouse=True)
def embedded_models() -> None:
    for entry in entries():
        local_path(entry.name)
