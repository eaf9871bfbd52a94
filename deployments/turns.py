"""Taking turns: what one client asks for waits for what it asked before, and not the other clients behind it."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import ParamSpec, TypeVar

from rapid.errors import Overloaded

LONGEST_WAIT_S = 600.0  # for a turn, as long as an idle sequence stays open

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class _Line:
    """One client's: how many it has under way, and those that wait, the first come first."""

    num_running: int = 0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)


class Turns:
    """At most ``per_client`` of one client at once (None: any number). ``max_waiting`` more wait for their turn."""

    def __init__(self, per_client: int | None, max_waiting: int) -> None:
        self._per_client, self._max_waiting = per_client, max_waiting
        self._lines: defaultdict[str, _Line] = defaultdict(_Line)

    async def take(self, client: str) -> None:
        """Waits for a turn of ``client``; `give_back` ends it.

        Raises:
            Overloaded: too many of this client's wait already, or no turn came in `LONGEST_WAIT_S` (429).
        """
        if self._per_client is None:
            return
        line = self._lines[client]
        if line.num_running < self._per_client:
            line.num_running += 1
            return
        if len(line.waiting) >= self._max_waiting:
            raise Overloaded(
                f"{line.num_running} requests of yours are under way and {len(line.waiting)} wait for them: send fewer "
                "at once",
                status=429,
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.waiting.append(turn)
        try:
            async with asyncio.timeout(LONGEST_WAIT_S):
                await self._until(turn, line, client)
        except TimeoutError as error:
            message = f"no place came free in {LONGEST_WAIT_S:g} s among your own requests: send fewer at once"
            raise Overloaded(message, status=429) from error

    async def _until(self, turn: asyncio.Future[None], line: _Line, client: str) -> None:
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                line.waiting.remove(turn)
            else:  # the turn came at the moment in which the client left
                self.give_back(client)
            raise

    def give_back(self, client: str) -> None:
        """Ends a turn: the next of ``client`` has it."""
        if self._per_client is None:
            return
        line = self._lines[client]
        while line.waiting:
            turn = line.waiting.popleft()
            if not turn.done():
                return turn.set_result(None)
        line.num_running -= 1
        if not line.num_running:
            del self._lines[client]

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Holds a turn of ``client`` for the block."""
        await self.take(client)
        try:
            yield
        finally:
            self.give_back(client)


class FairPool:
    """``num_threads`` threads that one client cannot fill: ``per_client`` things of each are under way at a time.

    So the queue before the threads is as long as there are clients, whatever each of them asks for.
    """

    def __init__(self, num_threads: int, name: str, *, per_client: int = 1, max_waiting: int = 256) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._turns = Turns(per_client, max_waiting)

    async def run(self, client: str, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """``call`` in a thread. A call that began goes on when its client leaves, and so does that client's turn.

        Raises:
            Overloaded: too many calls of this client wait already.
        """
        loop = asyncio.get_running_loop()
        await self._turns.take(client)

        def ended(_: Future[R]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._turns.give_back, client)

        future = self._threads.submit(partial(call, *args, **kwargs))
        future.add_done_callback(ended)
        return await asyncio.wrap_future(future)

    async def steps(self, client: str, items: Iterator[R]) -> AsyncGenerator[R, None]:
        """The ``items``, each computed as a call of its own, so that long work of one client stands before nobody.

        Who stops asking ends the work behind the item under way.

        Raises:
            Overloaded: as `run`.
        """
        while item := await self.run(client, lambda: list(islice(items, 1))):
            yield item[0]
