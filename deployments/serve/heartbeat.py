"""Streams between processes that tell work from a hang: where there is nothing to say, None is said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

T = TypeVar("T")

BEAT_S = 0.5
_END = object()


async def beating(items: AsyncGenerator[T, None], every_s: float = BEAT_S) -> AsyncGenerator[T | None, None]:
    """None at once, then ``items``, and None again whenever there was none for ``every_s``.

    Closing it closes ``items``.
    """
    coming: asyncio.Future[T | object] | None = None
    try:
        yield None
        while True:
            coming = asyncio.ensure_future(anext(items, _END))
            while not (await asyncio.wait([coming], timeout=every_s))[0]:
                yield None
            item = coming.result()
            if item is _END:
                return
            yield item  # type: ignore[misc]  # of T
    finally:
        if coming is not None and not coming.done():
            coming.cancel()
            await asyncio.wait([coming])
        await items.aclose()


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
