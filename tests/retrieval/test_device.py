"""Whose forward pass is next."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from retrieval.device import DeviceTurns, stand_behind, stands_behind

DEADLINE_S = 10.0


def test_a_query_waits_for_the_pass_under_way_alone():
    turns, order = DeviceTurns(), []

    def read(name: str, is_query: bool) -> None:
        with turns.turn(is_query=is_query):
            order.append(name)

    def begin(name: str, *, is_query: bool) -> threading.Thread:
        thread = threading.Thread(target=read, args=(name, is_query), name=name)
        thread.start()
        return thread

    def num_waiting() -> int:
        return len(turns._changed._waiters)

    with turns.turn(is_query=False):
        threads = [begin("document", is_query=False), begin("document", is_query=False)]
        assert wait_until(lambda: num_waiting() == 2)
        threads.append(begin("query", is_query=True))
        assert wait_until(lambda: num_waiting() == 3)
        assert order == [] and turns.is_wanted
    for thread in threads:
        thread.join(DEADLINE_S)
    assert order == ["query", "document", "document"] and not turns.is_wanted


def test_a_pass_that_fails_gives_its_turn_back():
    turns = DeviceTurns()
    for is_query in (True, False):
        try:
            with turns.turn(is_query=is_query):
                raise ValueError("no such token")
        except ValueError:
            pass
    done = threading.Event()

    def read() -> None:
        with turns.turn(is_query=False):
            done.set()

    threading.Thread(target=read, daemon=True).start()
    assert done.wait(DEADLINE_S)


def wait_until(is_so) -> bool:
    ticks = threading.Event()
    return any(is_so() or ticks.wait(0.005) for _ in range(2000))


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has no priority of its own")
def test_a_system_that_refuses_to_let_a_thread_stand_behind_costs_no_call(monkeypatch):
    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refused)
    with ThreadPoolExecutor(1, initializer=stand_behind) as pool:
        assert pool.submit(stands_behind).result(30) is False
