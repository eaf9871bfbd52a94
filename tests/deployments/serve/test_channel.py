"""Calls between processes: every one is answered or fails, and nothing is unpickled that a stranger sent."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.serve.backend import _close_with
from deployments.serve.channel import Address, Channel, Listener
from rapid.errors import EngineLost, Overloaded, SequenceClosed

HOST = "127.0.0.1"


class Engine:
    """What a test calls: echoes, waits until it may go on, or fails."""

    def __init__(self) -> None:
        self.may_go_on = asyncio.Event()
        self.entered = asyncio.Event()
        self.ended: asyncio.Queue[str] = asyncio.Queue()

    async def echo(self, *args: Any) -> Any:
        return args

    async def wait(self) -> str:
        self.entered.set()
        await self.may_go_on.wait()
        return "went on"

    async def fail(self, error: Exception) -> None:
        raise error


@asynccontextmanager
async def listening(engine: Engine) -> AsyncIterator[Address]:
    methods = {"echo": engine.echo, "wait": engine.wait, "fail": engine.fail}
    listener = await Listener.start(HOST, methods, ended=engine.ended.put)
    try:
        yield listener.address
    finally:
        listener.close()
    while len(asyncio.all_tasks()) > 1:  # the other end has to notice that a channel is closed
        await asyncio.sleep(0)


def conversation(body: Callable[[Channel, Engine], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        engine = Engine()
        async with listening(engine) as address:
            channel = await Channel.connect(address, "a")
            await body(channel, engine)
            channel.close()
            engine.may_go_on.set()

    asyncio.run(main())


def test_an_answer_does_not_wait_for_an_earlier_call_s() -> None:
    async def body(channel: Channel, engine: Engine) -> None:
        slow, fast = channel.call("wait"), channel.call("echo", 1, b"x" * 200_000)
        assert await fast == (1, b"x" * 200_000)
        assert not slow.done()
        engine.may_go_on.set()
        assert await slow == "went on"

    conversation(body)


def test_errors_arrive_as_they_are_raised() -> None:
    async def body(channel: Channel, engine: Engine) -> None:
        with pytest.raises(Overloaded, match="full") as caught:
            await channel.call("fail", Overloaded("full", status=429))
        assert caught.value.status == 429
        with pytest.raises(EngineLost):
            await channel.call("fail", SequenceClosed("cancelled"))
        with pytest.raises(RuntimeError, match="ValueError: met a sequence at 3"):
            await channel.call("fail", ValueError("met a sequence at 3"))
        with pytest.raises(RuntimeError, match="no_such"):
            await channel.call("no_such")
        assert await channel.call("echo") == ()

    conversation(body)


def test_a_cancelled_call_disturbs_no_other() -> None:
    async def body(channel: Channel, engine: Engine) -> None:
        cancelled, other = channel.call("wait"), channel.call("wait")
        cancelled.cancel()
        engine.may_go_on.set()
        assert await other == "went on"

    conversation(body)


@pytest.mark.parametrize("started", [True, False])
def test_closing_fails_what_is_under_way_and_what_comes_later(started: bool) -> None:
    async def body(channel: Channel, engine: Engine) -> None:
        waiting = channel.call("wait")
        if started:
            await engine.entered.wait()
        channel.close()
        for call in (waiting, channel.call("echo")):
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(call, 10)
        with pytest.raises(ConnectionError):
            await channel.call("echo")

    conversation(body)


def test_whoever_listens_is_told_which_channel_ended() -> None:
    async def main() -> None:
        engine = Engine()
        async with listening(engine) as address:
            lost, closed = [await Channel.connect(address, name) for name in ("lost", "closed")]
            waiting = lost.call("wait")
            await engine.entered.wait()
            assert engine.ended.empty()
            lost._writer.transport.abort()  # as when its process dies
            assert await asyncio.wait_for(engine.ended.get(), 10) == "lost"
            with pytest.raises(ConnectionError):
                await waiting
            closed.close()
            assert await asyncio.wait_for(engine.ended.get(), 10) == "closed"
            engine.may_go_on.set()

    asyncio.run(main())


def test_a_stream_that_fails_ends_the_calls_that_no_connection_would_end() -> None:
    """A node that is gone sends nothing any more; Ray notices, and the lease's stream fails."""

    async def body(channel: Channel, engine: Engine) -> None:
        dead = asyncio.Event()

        async def stream() -> AsyncIterator[None]:
            await dead.wait()
            raise RuntimeError("the replica died")
            yield

        watching = asyncio.create_task(_close_with(stream(), channel))
        waiting = channel.call("wait")
        await engine.entered.wait()
        assert not waiting.done()
        dead.set()
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(waiting, 10)
        await watching

    conversation(body)


def _listen_until_killed(pipe: Any) -> None:
    async def main() -> None:
        async with listening(Engine()) as address:
            pipe.send(address)
            await asyncio.Event().wait()

    asyncio.run(main())


def test_a_process_that_is_killed_fails_every_call() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_listen_until_killed, args=(theirs,), daemon=True)
    process.start()

    async def main() -> None:
        address = await asyncio.to_thread(ours.recv)
        channel = await Channel.connect(address, "a")
        assert await channel.call("echo", 1) == (1,)
        waiting = [channel.call("wait") for _ in range(3)]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        for call in waiting:
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(call, 10)
        with pytest.raises(ConnectionError):
            await channel.call("echo", 1)
        await asyncio.to_thread(process.join)
        with pytest.raises(OSError):
            await Channel.connect(address, "a")

    asyncio.run(main())
    process.close()
    ours.close()
    theirs.close()


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self._file),)


@pytest.mark.parametrize("knows_the_secret", [True, False])
def test_only_who_knows_the_secret_is_read(tmp_path: Path, knows_the_secret: bool) -> None:
    exploded = tmp_path / "exploded"

    async def main() -> None:
        async with listening(Engine()) as address:
            assert repr(address.secret) not in repr(address)
            if not knows_the_secret:
                address = replace(address, secret=bytes(len(address.secret)))
            channel = await Channel.connect(address, "a")
            if knows_the_secret:
                await channel.call("echo", Bomb(exploded))
            else:
                with pytest.raises(ConnectionError):
                    await asyncio.wait_for(channel.call("echo", Bomb(exploded)), 10)
            channel.close()

    asyncio.run(main())
    assert exploded.exists() == knows_the_secret
