"""Several prompts of one request: some are answered at once, and their events come in one stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing

from deployments.schemas.events import Event, Events, PromptScored, Started

_AT_ONCE = 4  # prompts of one request: it must not fill the engine's places


async def answered_together(answers: Sequence[Callable[[], Events]], num_choices: int) -> Events:
    """The events of all ``answers``, each of which has ``num_choices``. Closing the generator ends them all.

    The choices of answer i count from i · ``num_choices`` on, and its `Started` says which prompt it is. The first
    error ends all of them.
    """
    told: asyncio.Queue[Event | None] = asyncio.Queue(maxsize=_AT_ONCE)
    places = asyncio.Semaphore(_AT_ONCE)

    async def tell(i: int, answer: Callable[[], Events]) -> None:
        async with places, aclosing(answer()) as events:
            async for event in events:
                if isinstance(event, Started | PromptScored):
                    await told.put(event._replace(prompt=i))
                else:
                    await told.put(event._replace(choice=event.choice + i * num_choices))

    async def tell_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for i, answer in enumerate(answers):
                    group.create_task(tell(i, answer))
        except* Exception as errors:
            raise errors.exceptions[0] from None
        await told.put(None)

    telling = asyncio.create_task(tell_all())
    try:
        while True:
            coming = asyncio.ensure_future(told.get())
            await asyncio.wait([coming, telling], return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                telling.result()  # raises: it does not end before None was told
            event = coming.result()
            if event is None:
                return
            yield event
    finally:
        telling.cancel()
        await asyncio.wait([telling])
