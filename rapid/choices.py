"""Several completions of one prompt at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from rapid.backend.protocol import Backend, Retrieval
from rapid.events import Delta, Finish
from rapid.generate import generate
from rapid.request import GenerationRequest


async def generate_choices(
    request: GenerationRequest, num_choices: int, backend: Backend
) -> AsyncGenerator[Delta | Finish, None]:
    """`generate`, ``num_choices`` times; ``choice`` says which one an event is of, and each ends with a `Finish`.

    They share what is retrieved, and the keys and values of the prompt. Choice i has the seed plus i, where there is
    one: the same request with n = 1 and that seed writes the same. An error in one ends them all.
    """
    if num_choices == 1:
        async with aclosing(generate(request, backend)) as only:
            async for delta in only:
                yield delta
        return
    shared = _RetrieveOnce(backend)
    events: asyncio.Queue[Delta | Finish | Exception] = asyncio.Queue()

    async def write(choice: int) -> None:
        try:
            async with aclosing(generate(_seeded(request, choice), backend, shared.retrieve)) as deltas:
                async for event in deltas:
                    events.put_nowait(event._replace(choice=choice))
        except Exception as error:
            events.put_nowait(error)

    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(write(choice)) for choice in range(num_choices)]
    try:
        num_left = num_choices
        while num_left:
            event = await events.get()
            if isinstance(event, Exception):
                raise event
            num_left -= isinstance(event, Finish)
            yield event
    finally:
        for task in (tasks := [*tasks, *shared.tasks]):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _seeded(request: GenerationRequest, choice: int) -> GenerationRequest:
    seed = request.sampling.seed
    if seed is None:
        return request
    wrapped = (seed + choice + 2**63) % 2**64 - 2**63
    return replace(request, sampling=replace(request.sampling, seed=wrapped))


class _RetrieveOnce:
    """Asks the retriever for the first that wants to know, and tells the others the same."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.tasks: list[asyncio.Task[Retrieval]] = []

    async def retrieve(self, contents: list[str], query: str, options: Any) -> Retrieval:
        if not self.tasks:
            self.tasks.append(asyncio.create_task(self._backend.retrieve(contents, query, options)))
        return await asyncio.shield(self.tasks[0])
