"""What one client asks for does not hold up another."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from deployments import turns
from deployments.turns import FairPool, Spent, Turns
from rapid.errors import Overloaded
from retrieval.device import stands_behind


def test_a_client_with_much_to_do_holds_up_no_other() -> None:
    """Two threads, ten calls of one client, and one of another that came last: it is done while nine still wait."""

    async def story() -> None:
        pool, goes_on, done = FairPool(2, "test"), threading.Event(), []

        def work(client: str) -> None:
            if client == "hostile":
                assert goes_on.wait(30)
            done.append(client)

        many = [asyncio.create_task(pool.run("hostile", work, "hostile")) for _ in range(10)]
        await asyncio.sleep(0)
        await asyncio.wait_for(pool.run("honest", work, "honest"), 30)
        assert done == ["honest"]
        goes_on.set()
        await asyncio.gather(*many)
        assert done == ["honest", *["hostile"] * 10]

    asyncio.run(story())


def test_a_call_whose_client_left_keeps_its_turn_until_it_ends() -> None:
    """Else a client that leaves at once would have all threads."""

    async def story() -> None:
        pool, goes_on, begun = FairPool(2, "test"), threading.Event(), []

        def work() -> None:
            begun.append(1)
            assert goes_on.wait(30)

        for _ in range(5):
            left = asyncio.create_task(pool.run("hostile", work))
            for _ in range(3):
                await asyncio.sleep(0)
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)
        await asyncio.wait_for(pool.run("honest", int), 30)
        assert len(begun) == 1
        goes_on.set()
        await asyncio.wait_for(pool.run("hostile", int), 30)

    asyncio.run(story())


def test_steps_of_one_client_stand_before_no_step_of_another() -> None:
    """One thread, and a long work of one client: another's single step comes between two of its steps."""

    async def story() -> None:
        pool, done, goes_on = FairPool(1, "test"), [], threading.Event()

        def long() -> Iterator[int]:
            for i in range(100):
                if i == 3:
                    assert goes_on.wait(30)
                done.append("hostile")
                yield i

        async def all_of(client: str, work: Iterator[int]) -> list[int]:
            return [item async for item in pool.steps(client, work)]

        hostile = asyncio.create_task(all_of("hostile", long()))
        while len(done) < 3:
            await asyncio.sleep(0)
        honest = asyncio.create_task(pool.run("honest", done.append, "honest"))
        await asyncio.sleep(0)
        goes_on.set()
        await asyncio.wait_for(honest, 30)
        assert await hostile == list(range(100))
        assert done.index("honest") <= 5

    asyncio.run(story())


def test_steps_end_when_nobody_asks_for_them() -> None:
    async def story() -> None:
        pool, begun, goes_on, closed = FairPool(1, "test"), threading.Event(), threading.Event(), threading.Event()

        def work() -> Iterator[int]:
            try:
                begun.set()
                assert goes_on.wait(30)
                yield 1
                raise AssertionError("nobody waits for this")
            finally:
                closed.set()

        async def ask() -> None:
            async for _ in pool.steps("client", work()):
                pass

        asking = asyncio.create_task(ask())
        await asyncio.to_thread(begun.wait, 30)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        del asking
        goes_on.set()
        assert await asyncio.to_thread(closed.wait, 30)
        await asyncio.wait_for(pool.run("client", int), 30)

    asyncio.run(story())


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has no priority of its own")
def test_a_client_that_asked_for_much_stands_behind_the_engines_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=lambda: now))

    def work(seconds: float) -> bool:
        nonlocal now
        now += seconds
        return stands_behind()

    async def story() -> None:
        nonlocal now
        pool, usual = FairPool(1, "test", behind_engines=True), FairPool(1, "test")
        assert [await pool.run("heavy", work, 0.5) for _ in range(4)] == [False, False, True, True]
        assert not await pool.run("light", work, 0.0)
        assert await pool.run("heavy", work, 0.0)
        now += 10
        assert not await pool.run("heavy", work, 0.0)
        assert [await usual.run("heavy", work, 1.0) for _ in range(3)] == [False] * 3

    asyncio.run(story())
    assert not stands_behind()


def test_what_clients_spent_is_forgotten() -> None:
    spent = Spent()
    for i in range(1000):
        spent.add(f"client {i}", 1.0, now=float(i))
    assert spent.of("client 999", 999.0) == 1.0
    assert 0.4 < spent.of("client 999", 1001.0) < 0.6
    assert len(spent._of) < 50


def test_turns_come_in_order_and_none_is_lost() -> None:
    async def story() -> None:
        turns, order = Turns(1, max_waiting=3), []

        async def one(name: str) -> None:
            async with turns.turn("a"):
                order.append(name)
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(one(name)) for name in "1234"]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            await turns.take("a")
        assert caught.value.status == 429
        tasks[1].cancel()  # it waits
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == ["1", "3", "4"]
        await asyncio.wait_for(one("5"), 30)
        assert not turns._lines

    asyncio.run(story())


def test_clients_are_served_in_rotation() -> None:
    """A hundred requests of one client stand before no other's one."""

    async def story() -> None:
        turns, order = Turns(2, max_waiting=100, in_all=2), []

        async def one(client: str) -> None:
            async with turns.turn(client):
                order.append(client)
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(one("hostile")) for _ in range(100)]
        await asyncio.sleep(0)
        tasks += [asyncio.create_task(one(client)) for client in ("a", "b", "a")]
        await asyncio.wait_for(asyncio.gather(*tasks), 30)
        assert len(order) == 103 and order.index("b") <= 8
        assert [i for i, client in enumerate(order) if client == "a"][-1] <= 12
        assert not turns._lines and turns._num_running == 0

    asyncio.run(story())


def test_a_request_takes_as_many_turns_as_it_has_choices() -> None:
    async def story() -> None:
        turns = Turns(3, max_waiting=9, in_all=4)
        await turns.take("a", 2)
        wide = asyncio.create_task(turns.take("a", 8))  # as many as one client can have: all three
        await asyncio.sleep(0)
        await asyncio.wait_for(turns.take("b", 2), 30)
        turns.give_back("a", 2)
        await asyncio.sleep(0)
        assert not wide.done()  # two of four are another's
        await asyncio.wait_for(turns.take("c", 2), 30)  # who stands behind it but needs less
        turns.give_back("b", 2)
        turns.give_back("c", 2)
        await asyncio.wait_for(wide, 30)
        left = asyncio.create_task(turns.take("b", 2))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        turns.give_back("a", 8)
        assert not turns._lines and turns._num_running == 0

    asyncio.run(story())


def test_a_wait_for_a_turn_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.turns.LONGEST_WAIT_S", 0.01)

    async def story() -> None:
        turns = Turns(1, max_waiting=4)
        await turns.take("slow")
        with pytest.raises(Overloaded, match="no place came free"):
            await asyncio.wait_for(turns.take("slow"), 30)
        turns.give_back("slow")
        await asyncio.wait_for(turns.take("slow"), 30)  # nobody who gave up has the place

    asyncio.run(story())
