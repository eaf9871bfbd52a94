"""How long an answer is waited for: as long as the engine that owes it goes on.

How long a prefill or a queue may take depends on what else the engine does. So a wait does not end after a guessed
time: when an answer is late, the engine is asked for its `Pulse`, which another thread gives than the one that
computes. An engine that does not answer, or whose pass does not end, is lost.

The limits beside that are for an engine that works and yet never answers, which would be a fault of the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from rapid.engine.messages import Pulse
from rapid.errors import EngineHung

T = TypeVar("T")

LATE_S = 1.0  # an answer that is not there by then is late
TARGET_PATIENCE_S = 4.0  # for a pulse, and at least for a pass, of an engine that a request needs
DRAFTER_PATIENCE_S = 1.0  # and of one that it can do without
ROUND_LIMIT_S = 120.0
QUEUE_LIMIT_S = 1800.0  # for a place, behind requests that have one
PREFILL_FLOOR = 20.0  # tokens per second, of the slowest prefill that is waited for
RETRIEVAL_FLOOR = 500.0  # characters per second, likewise
RETRIEVAL_START_S = 60.0


async def while_it_goes_on(
    answer: Awaitable[T], pulse: Callable[[], Awaitable[Pulse]], *, patience_s: float, limit_s: float
) -> T:
    """The ``answer``. Giving up, or being cancelled, cancels it.

    Raises:
        EngineHung: the answer is late, and the engine gave no ``pulse`` within ``patience_s``, or is stuck in a pass,
            or ``limit_s`` are over.
    """
    waiting = asyncio.ensure_future(answer)
    started = time.monotonic()
    try:
        while not (await asyncio.wait([waiting], timeout=LATE_S))[0]:
            await _check(pulse, patience_s)
            if time.monotonic() - started > limit_s:
                raise EngineHung(f"the engine works, but has not answered for {limit_s:.0f} s")
        return waiting.result()
    finally:
        waiting.cancel()


async def _check(pulse: Callable[[], Awaitable[Pulse]], patience_s: float) -> None:
    try:
        async with asyncio.timeout(patience_s):
            now = await pulse()
    except TimeoutError as error:
        raise EngineHung(f"the engine's process has not answered for {LATE_S + patience_s:g} s") from error
    if problem := now.problem(patience_s):
        raise EngineHung(f"the engine is {problem}")


def prefill_limit_s(num_tokens: int) -> float:
    """For a prefill of ``num_tokens``, with other sequences in the same passes."""
    return ROUND_LIMIT_S + num_tokens / PREFILL_FLOOR


def retrieval_limit_s(contents: list[str]) -> float:
    """For chunking and embedding ``contents``, and the search."""
    return RETRIEVAL_START_S + sum(map(len, contents)) / RETRIEVAL_FLOOR
