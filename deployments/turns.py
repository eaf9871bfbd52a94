"""Taking turns: what one client asks for waits for what it asked before, and not the other clients behind it."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import ParamSpec, TypeVar

from rapid.errors import Overloaded
from retrieval.device import stand_behind

_MUCH_S, _HALF_LIFE_S = 0.75, 2.0  # of calls' time: with more a client's calls go behind; half is forgotten in so long
LONGEST_WAIT_S = 600.0  # for a turn, as long as an idle sequence stays open

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class _Line:
    """One client's: how many turns it has, and the requests that wait, the first come first, with the turns of each."""

    num_running: int = 0
    waiting: deque[tuple[asyncio.Future[None], int]] = field(default_factory=deque)


class Turns:
    """At most ``per_client`` turns of one client at once, and ``in_all`` of all clients (None: any number).

    ``max_waiting`` requests of a client wait for theirs. Clients are served in rotation, so that one's hundred requests
    stand before no other's one. Who asks for more turns than there can be gets as many as there can be.
    """

    def __init__(self, per_client: int | None, max_waiting: int, *, in_all: int | None = None) -> None:
        self._per_client, self._in_all = per_client or math.inf, in_all or math.inf
        self._max_waiting, self._num_running = max_waiting, 0
        self._lines: OrderedDict[str, _Line] = OrderedDict()  # who was served least recently first

    async def take(self, client: str, num: int = 1) -> None:
        """Waits for ``num`` turns of ``client``; `give_back` of as many ends them.

        Raises:
            Overloaded: too many of this client's wait already, or no turn came in `LONGEST_WAIT_S` (429).
        """
        line, num = self._lines.setdefault(client, _Line()), self._counted(num)
        if not line.waiting and self._has_room(line, num):
            return self._start(client, line, num)
        if len(line.waiting) >= self._max_waiting:
            raise Overloaded(
                f"{line.num_running} requests of yours are under way and {len(line.waiting)} wait for them: send fewer "
                "at once",
                status=429,
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.waiting.append((turn, num))
        try:
            async with asyncio.timeout(LONGEST_WAIT_S):
                await self._until(turn, num, client)
        except TimeoutError as error:
            message = f"no place came free in {LONGEST_WAIT_S:g} s: send fewer requests at once"
            raise Overloaded(message, status=429) from error

    async def _until(self, turn: asyncio.Future[None], num: int, client: str) -> None:
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._lines[client].waiting.remove((turn, num))
                self._serve()  # who stood behind it may need less
            else:  # the turn came at the moment in which the client left
                self.give_back(client, num)
            raise

    def give_back(self, client: str, num: int = 1) -> None:
        """Ends ``num`` turns; whoever is next has them."""
        self._lines[client].num_running -= self._counted(num)
        self._num_running -= self._counted(num)
        self._serve()

    @asynccontextmanager
    async def turn(self, client: str, num: int = 1) -> AsyncIterator[None]:
        """Holds ``num`` turns of ``client`` for the block."""
        await self.take(client, num)
        try:
            yield
        finally:
            self.give_back(client, num)

    def _serve(self) -> None:
        """Starts what waits, as far as there is room. Who needs more than there is does not hold up the others."""
        for client in list(self._lines):
            line = self._lines[client]
            first = next((wait for wait in line.waiting if not wait[0].done()), None)  # one that is done has given up
            if first and self._has_room(line, first[1]):
                line.waiting.remove(first)
                self._start(client, line, first[1])
                first[0].set_result(None)
                return self._serve()
            if not line.waiting and not line.num_running:
                del self._lines[client]

    def _start(self, client: str, line: _Line, num: int) -> None:
        line.num_running += num
        self._num_running += num
        self._lines.move_to_end(client)

    def _has_room(self, line: _Line, num: int) -> bool:
        return line.num_running + num <= self._per_client and self._num_running + num <= self._in_all

    def _counted(self, num: int) -> int:
        return int(min(num, self._per_client, self._in_all))


class Spent:
    """How long each client's calls have taken lately. Half of that is forgotten every `_HALF_LIFE_S`."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, tuple[float, float]] = OrderedDict()  # (seconds, when), the earliest first

    def add(self, client: str, took_s: float, now: float) -> None:
        self._of[client] = (self.of(client, now) + took_s, now)
        self._of.move_to_end(client)
        while len(self._of) > 1 and self.of(first := next(iter(self._of)), now) < 0.01 * _MUCH_S:
            del self._of[first]

    def of(self, client: str, now: float) -> float:
        spent_s, when = self._of.get(client, (0.0, now))
        return float(spent_s * 0.5 ** ((now - when) / _HALF_LIFE_S))


class FairPool:
    """``num_threads`` threads that one client cannot fill: ``per_client`` things of each are under way at a time.

    So the queue before the threads is as long as there are clients, whatever each of them asks for.

    With ``behind_engines`` a client that has asked for much lately has threads that compute when nobody else on the
    same cores does (`retrieval.device.stand_behind`): each running request waits for the engines' steps, and for short
    calls like those that read its prompt.
    """

    def __init__(
        self,
        num_threads: int,
        name: str,
        *,
        per_client: int = 1,
        max_waiting: int = 256,
        behind_engines: bool = False,
    ) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._behind = self._threads
        if behind_engines:
            self._behind = ThreadPoolExecutor(num_threads, f"{name}-behind", initializer=stand_behind)
        self._turns, self._spent = Turns(per_client, max_waiting), Spent()

    async def run(self, client: str, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """``call`` in a thread. A call that began goes on when its client leaves, and so does that client's turn.

        Raises:
            Overloaded: too many calls of this client wait already.
        """
        loop = asyncio.get_running_loop()
        await self._turns.take(client)
        began = time.monotonic()

        def end() -> None:
            now = time.monotonic()
            self._spent.add(client, now - began, now)
            self._turns.give_back(client)

        def ended(_: Future[R]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(end)

        threads = self._behind if self._spent.of(client, began) > _MUCH_S else self._threads
        future = threads.submit(partial(call, *args, **kwargs))
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
