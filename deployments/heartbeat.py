"""Streams between processes that tell work from a hang: where there is nothing to say, None is said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")

BEAT_S = 0.5
_END = object()
_closing: set[asyncio.Task[None]] = set()  # asyncio itself keeps no task alive


async def beating(items: AsyncGenerator[T, None], every_s: float = BEAT_S) -> AsyncGenerator[T | None, None]:
    """None at once, then ``items``, and None again whenever there was none for ``every_s``.

    Closing it closes ``items``, also when who waits for that is cancelled meanwhile: half closed they would hold their
    engines' sequences. All of ``items`` runs in one context: what it sets there for itself, as a span of a trace does,
    has to be there when it goes on.
    """
    coming: asyncio.Task[T | object] | None = None
    context, loop = copy_context(), asyncio.get_running_loop()

    async def following() -> T | object:
        return await anext(items, _END)

    async def close() -> None:
        if coming is not None and not coming.done():
            coming.cancel()
            await asyncio.wait([coming])
        await items.aclose()

    try:
        yield None
        while True:
            coming = loop.create_task(following(), context=context)
            while not (await asyncio.wait([coming], timeout=every_s))[0]:
                yield None
            item = coming.result()
            if item is _END:
                return
            yield item  # type: ignore[misc]  # of T
    finally:
        closed = loop.create_task(close(), context=context)
        _closing.add(closed)
        closed.add_done_callback(_closing.discard)
        await asyncio.shield(closed)


async def heard(stream: AsyncIterator[T | None], *, first_s: float, silent_s: float) -> AsyncGenerator[T, None]:
    """The items of a `beating` stream.

    Raises:
        TimeoutError: nothing was heard for ``first_s`` at the start, or for ``silent_s`` later.
    """
    limit_s = first_s
    while True:
        async with asyncio.timeout(limit_s):
            item = await anext(stream, _END)
        if item is _END:
            return
        limit_s = silent_s
        if item is not None:
            yield item  # type: ignore[misc]  # of T
