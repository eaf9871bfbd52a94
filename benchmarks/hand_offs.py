"""What a round waits for around the engines' own work: until a call's task begins, and from its end to its answer.

Two engines of one process, with the tiny models of `benchmarks.coordination`. The tasks are timed from outside. So an
earlier checkout can be timed by the same file (`benchmarks.paired`), while the times that engines report have not
always ended at the same line. It reads from its input how many rounds to make, and prints them as JSON, line by line.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Generator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from benchmarks.coordination import GAMMA, save_next_to_nothing
from deployments.builders import build_engine
from deployments.config import parse_config
from rapid.engine.engine import Engine
from rapid.engine.lease import LeasedSequence
from rapid.engine.messages import DraftRequest, SequenceRequest, VerifyRequest
from rapid.sampling.params import SamplingParams
from rapid.speculation.draft import DraftLimits

SWITCH_INTERVAL_S = 2e-4  # of the engines' processes; each checkout has its own name for it


class Timed:
    """Submits tasks to ``engine``, and knows when the latest began and ended."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.model = engine, engine.model

    def submit(self, task: Any, *sequence: Any) -> Future[Any]:
        def timed() -> Generator[Any, Any, Any]:
            self.began = time.perf_counter()
            result = yield from task
            self.ended = time.perf_counter()
            return result

        return self._engine.submit(timed(), *sequence)


def load(folder: str) -> list[Engine]:
    """The target's engine and the drafter's."""
    settings = {"model": folder, "dtype": "float32", "kv_memory_gib": 0.1, "threads": 1}
    config = parse_config({"target": settings, "drafter": settings})
    return [build_engine(each) for each in (config.target, config.drafter) if each]


async def rounds(engines: list[Engine], num: int) -> list[float]:
    """What ``num`` rounds of a new pair of sequences waited for, in milliseconds."""
    timed = target_time, drafter_time = [Timed(engine) for engine in engines]
    request = SequenceRequest([5] * 300, num * (GAMMA + 1) + GAMMA + 1, SamplingParams())
    opened = [await asyncio.wrap_future(engine.open(request)) for engine in engines]
    leases = [LeasedSequence(each, sequence) for each, sequence in zip(timed, opened, strict=True)]
    target, drafter = leases
    await asyncio.gather(target.prefill(), drafter.prefill())
    knows, output, waited = 0, list[int](), list[float]()
    for _ in range(num):
        began = time.perf_counter()
        draft = await drafter.propose(DraftRequest(knows, output[knows:], DraftLimits(GAMMA)))
        verified = await target.verify(VerifyRequest(draft, transfers=True))
        took = time.perf_counter() - began
        waited.append((took - sum(each.ended - each.began for each in (drafter_time, target_time))) * 1e3)
        knows = len(output)
        output += verified.tokens
    for engine, sequence in zip(engines, opened, strict=True):
        engine.close(sequence)
    return waited


def main() -> None:
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with tempfile.TemporaryDirectory() as folder:
        save_next_to_nothing(Path(folder))
        engines = load(folder)
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(asyncio.run(rounds(engines, *json.loads(line)))), flush=True)
        for engine in engines:
            engine.shutdown()


if __name__ == "__main__":
    main()
