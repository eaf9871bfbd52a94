"""`benchmarks.hand_offs` stands between leases and their engines, whose calls it has to know."""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks import hand_offs
from benchmarks.coordination import save_next_to_nothing


def test_a_few_rounds_are_timed(tmp_path: Path) -> None:
    save_next_to_nothing(tmp_path)
    engines = hand_offs.load(str(tmp_path))
    for _ in range(2):
        waited = asyncio.run(hand_offs.rounds(engines, 3))
        assert len(waited) == 3 and all(ms > 0 for ms in waited)
    for engine in engines:
        engine.shutdown()
