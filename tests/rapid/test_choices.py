"""Several choices of one prompt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from world import World, first_eight

from rapid.backend.local import LocalBackend
from rapid.backend.protocol import Lease, Role
from rapid.engine.messages import SequenceRequest
from rapid.events import Delta
from rapid.generate import generate_choices
from rapid.sampling.params import SamplingParams


class Counting(LocalBackend):
    """Knows how many leases were open at the same time."""

    most = num_open = 0

    @asynccontextmanager
    async def lease(self, role: Role, request: SequenceRequest) -> AsyncIterator[Lease]:
        async with super().lease(role, request) as lease:
            self.num_open += 1
            self.most = max(self.most, self.num_open)
            yield lease
            self.num_open -= 1


async def written(world: World, backend: LocalBackend, at_once: int | None) -> dict[int, list[int]]:
    request = world.request(strategy="autoregressive", sampling=SamplingParams(temperature=1.0, seed=3))
    tokens: dict[int, list[int]] = {choice: [] for choice in range(5)}
    async for event in generate_choices(request, 5, backend, at_once=at_once):
        if isinstance(event, Delta):
            tokens[event.choice] += event.tokens
    return tokens


def test_no_more_choices_are_written_at_once_than_may_be(world: World) -> None:
    """Each writes what it writes beside all others: with a seed its text tells that it is the right one."""
    backend = Counting(world.target, world.drafter, first_eight)
    together = asyncio.run(written(world, world.backend(), None))
    assert asyncio.run(written(world, backend, 2)) == together
    assert all(together.values()) and backend.most <= 2
