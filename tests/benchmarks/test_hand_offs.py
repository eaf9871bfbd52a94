"""`benchmarks.hand_offs` stands between leases and their engines, whose calls it has to know."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks import hand_offs
from benchmarks.coordination import save_next_to_nothing


def test_a_few_rounds_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_offs, "ROUNDS", 3)
    monkeypatch.setattr(hand_offs, "WARM", 0)
    save_next_to_nothing(tmp_path)
    assert all(ms > 0 for ms in asyncio.run(hand_offs.rounds(str(tmp_path))).values())
