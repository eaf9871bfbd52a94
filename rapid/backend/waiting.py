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
from typing import Any, TypeVar

from rapid.engine.messages import Pulse
from rapid.errors import EngineHung

T = TypeVar("T")

TARGET_PATIENCE_S = 4.0  # for a pulse, and at least for a pass, of an engine that a request needs
DRAFTER_PATIENCE_S = 1.4  # and of one that it can do without: with `LATE`, a hang costs less than two seconds
LATE = 0.25  # of the patience: an answer that is not there by then is late
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
    waiting, watching = asyncio.ensure_future(answer), None

    def begin_to_watch() -> None:
        nonlocal watching
        watching = asyncio.ensure_future(_watch(waiting, pulse, patience_s, limit_s))

    # A round waits twice, so an answer in time must cost no task: only a timer.
    timer = asyncio.get_running_loop().call_later(LATE * patience_s, begin_to_watch)
    try:
        return await waiting
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if watching is not None and watching.done() and not (task and task.cancelling()):
            watching.result()  # why it has given up
        raise
    finally:
        timer.cancel()
        waiting.cancel()
        if watching is not None:
            watching.cancel()


async def _watch(
    waiting: asyncio.Future[Any], pulse: Callable[[], Awaitable[Pulse]], patience_s: float, limit_s: float
) -> None:
    """Cancels ``waiting``, and raises why, when the engine that owes it does not go on."""
    late = time.monotonic()
    try:
        while True:
            await _check(pulse, patience_s)
            if time.monotonic() - late > limit_s:
                raise EngineHung(f"the engine works, but has not answered for {limit_s:.0f} s")
            await asyncio.sleep(LATE * patience_s)
    except Exception:
        waiting.cancel()
        raise


async def _check(pulse: Callable[[], Awaitable[Pulse]], patience_s: float) -> None:
    try:
        async with asyncio.timeout(patience_s):
            now = await pulse()
    except TimeoutError as error:
        raise EngineHung(f"the engine's process has not answered for {(1 + LATE) * patience_s:g} s") from error
    if problem := now.problem(patience_s):
        raise EngineHung(f"the engine is {problem}")


def prefill_limit_s(num_tokens: int) -> float:
    """For a prefill of ``num_tokens``, with other sequences in the same passes."""
    return ROUND_LIMIT_S + num_tokens / PREFILL_FLOOR


def retrieval_limit_s(contents: list[str]) -> float:
    """For chunking and embedding ``contents``, and the search."""
    return RETRIEVAL_START_S + sum(map(len, contents)) / RETRIEVAL_FLOOR
