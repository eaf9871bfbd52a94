"""Streams: when their headers are sent, what is said while nothing is written, and how an error ends them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TypeVar

from fastapi.responses import StreamingResponse

from deployments.heartbeat import beating
from deployments.schemas.events import Event, Events

T = TypeVar("T")

_STATUS_WITHIN_S = 0.5
_BEAT_S = 5.0  # proxies close a connection on which nothing came for 15 s and more
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second is nginx's


def streamed(sent: AsyncGenerator[str, None]) -> StreamingResponse:
    """``sent`` as server-sent events."""
    return StreamingResponse(sent, media_type="text/event-stream", headers=_HEADERS)


async def begun(events: Events) -> AsyncGenerator[Event | None, None]:
    """``events``, with None whenever there was none for a while; returned when the headers may be sent.

    An error that comes at once, as when there is no room, is raised, and gets its own status. Later errors come with
    the events.
    """
    beats = beating(events, _BEAT_S)
    await anext(beats)  # its first
    started = await anext(beats)
    while started is None:
        started = await anext(beats)
    second = asyncio.ensure_future(anext(beats))
    await asyncio.wait([second], timeout=_STATUS_WITHIN_S)
    if second.done():
        second.result()
    return _chained(started, second, beats)


async def told(
    events: AsyncGenerator[Event | None, None],
    tell: Callable[[Event], AsyncGenerator[str, None]],
    failed: Callable[[Exception], str],
    *,
    beat: str = ": keep-alive\n\n",
    end: str = "",
) -> AsyncGenerator[str, None]:
    """What ``tell`` makes of each event, ``beat`` for each None, what ``failed`` makes of an error, and ``end``."""
    try:
        async with aclosing(events):
            async for event in events:
                if event is None:
                    yield beat
                    continue
                async with aclosing(tell(event)) as texts:
                    async for text in texts:
                        yield text
    except Exception as error:
        yield failed(error)
    if end:
        yield end


async def _chained(first: T, second: asyncio.Future[T], rest: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """All items in one generator. Closing it closes ``rest``."""
    async with aclosing(rest):
        yield first
        yield await second
        async for item in rest:
            yield item
