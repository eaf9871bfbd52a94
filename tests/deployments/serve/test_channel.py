"""Calls between processes: every one is answered or fails, and nothing is done that a stranger sent."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.serve.backend import _close_with
from deployments.serve.channel import Address, Channel, Listener
from rapid.errors import EngineLost, Overloaded, RapidError, SequenceClosed

HOST = "127.0.0.1"


class Engine:
    """What a test calls: echoes, waits until it may go on, or fails."""

    def __init__(self) -> None:
        self.may_go_on = asyncio.Event()
        self.entered = asyncio.Event()
        self.ended: asyncio.Queue[str] = asyncio.Queue()

    async def echo(self, channel: str, *args: Any) -> Any:
        return args

    async def who(self, channel: str) -> str:
        return channel

    async def wait(self, channel: str) -> str:
        self.entered.set()
        await self.may_go_on.wait()
        return "went on"

    async def fail(self, channel: str, error: RapidError | str) -> None:
        raise error if isinstance(error, RapidError) else ValueError(error)

    async def answer_what_does_not_travel(self, channel: str) -> Any:
        return object()


@asynccontextmanager
async def listening(engine: Engine) -> AsyncIterator[Address]:
    names = ("echo", "who", "wait", "fail", "answer_what_does_not_travel")
    methods = {name: getattr(engine, name) for name in names}
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
            channel = await Channel.connect(address.for_channel("a"), "a")
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
            await channel.call("fail", "met a sequence at 3")
        with pytest.raises(RuntimeError, match="no_such"):
            await channel.call("no_such")
        with pytest.raises(RuntimeError, match="object does not travel"):
            await channel.call("answer_what_does_not_travel")
        with pytest.raises(TypeError, match="object does not travel"):
            channel.call("echo", object())
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
            with pytest.raises(EngineLost):
                await asyncio.wait_for(call, 10)
        with pytest.raises(EngineLost):
            await channel.call("echo")

    conversation(body)


def test_whoever_listens_is_told_which_channel_ended() -> None:
    async def main() -> None:
        engine = Engine()
        async with listening(engine) as address:
            lost, closed = [await Channel.connect(address.for_channel(name), name) for name in ("lost", "closed")]
            waiting = lost.call("wait")
            await engine.entered.wait()
            assert engine.ended.empty()
            lost._transport.abort()  # as when its process dies
            assert await asyncio.wait_for(engine.ended.get(), 10) == "lost"
            with pytest.raises(EngineLost):
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
        with pytest.raises(EngineLost):
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
        address = address.for_channel("a")
        channel = await Channel.connect(address, "a")
        assert await channel.call("echo", 1) == (1,)
        waiting = [channel.call("wait") for _ in range(3)]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        for call in waiting:
            with pytest.raises(EngineLost):
                await asyncio.wait_for(call, 10)
        with pytest.raises(EngineLost):
            await channel.call("echo", 1)
        await asyncio.to_thread(process.join)
        with pytest.raises(OSError):
            await Channel.connect(address, "a")

    asyncio.run(main())
    process.close()
    ours.close()
    theirs.close()


class Tapped:
    """A wire between a caller and a listener: it keeps what goes to the listener, and may change it."""

    def __init__(self, address: Address, change: Callable[[bytes], bytes] = bytes) -> None:
        self._address, self._change, self.sent = address, change, b""
        self._carrying: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def between(self) -> AsyncIterator[Address]:
        server = await asyncio.start_server(self._join, HOST, 0)
        yield replace(self._address, port=server.sockets[0].getsockname()[1])
        server.close()
        for task in self._carrying:
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        listener_reader, listener_writer = await asyncio.open_connection(self._address.host, self._address.port)

        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_call: bool) -> None:
            try:
                while data := await reader.read(2**20):
                    if is_call:
                        self.sent += data
                    writer.write(self._change(data) if is_call else data)
            finally:
                writer.close()

        ways = ((reader, listener_writer, True), (listener_reader, writer, False))
        self._carrying += [asyncio.create_task(carry(*way)) for way in ways]


def test_no_secret_travels_and_what_was_seen_once_opens_nothing() -> None:
    async def main() -> None:
        async with listening(Engine()) as address:
            mine = address.for_channel("a")
            assert repr(mine.secret) not in repr(mine) and mine.secret != address.secret
            async with (tap := Tapped(mine)).between() as tapped:
                channel = await Channel.connect(tapped, "a")
                assert await channel.call("echo", "hello") == ("hello",)
                channel.close()
            assert b"hello" in tap.sent  # it is not encrypted
            for secret in (address.secret, mine.secret):
                assert secret not in tap.sent and secret[:8] not in tap.sent
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(tap.sent)  # all of it again
            answer = await asyncio.wait_for(reader.read(), 10)
            assert len(answer) == 64  # a greeting, and no answer
            writer.close()

    asyncio.run(main())


def test_what_is_changed_on_the_way_is_not_done() -> None:
    async def main() -> None:
        engine = Engine()
        async with listening(engine) as address:
            tap = Tapped(address.for_channel("a"), lambda data: data.replace(b"echo", b"wait"))
            async with tap.between() as tapped:
                channel = await Channel.connect(tapped, "a")
                with pytest.raises(EngineLost):
                    await asyncio.wait_for(channel.call("echo"), 10)
                channel.close()
            assert not engine.entered.is_set()

    asyncio.run(main())


def test_the_key_of_one_channel_opens_no_other() -> None:
    async def main() -> None:
        async with listening(Engine()) as address:
            mine = address.for_channel("mine")
            with pytest.raises(ConnectionError):
                await Channel.connect(mine, "another's")
            with pytest.raises(ConnectionError):
                await Channel.connect(replace(address, secret=bytes(32)), "mine")
            channel = await Channel.connect(mine, "mine")
            assert await channel.call("who") == "mine"  # whatever it says
            channel.close()

    asyncio.run(main())


def test_who_does_not_know_the_key_is_not_called() -> None:
    """A process that listens where an engine was learns nothing, and is told nothing."""

    async def main() -> None:
        heard, ended = bytearray(), asyncio.Event()

        async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                heard.extend(await reader.readexactly(34))
                writer.write(bytes(64))
                heard.extend(await reader.read())
            finally:
                ended.set()
                writer.close()

        server = await asyncio.start_server(pretend, HOST, 0)
        address = Address(HOST, server.sockets[0].getsockname()[1], bytes(32))
        with pytest.raises(ConnectionRefusedError):
            await Channel.connect(address, "a")
        await asyncio.wait_for(ended.wait(), 10)
        server.close()
        assert len(heard) == 34

    asyncio.run(main())


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self._file),)


def test_even_who_knows_the_key_sends_no_code(tmp_path: Path) -> None:
    exploded = tmp_path / "exploded"

    async def main() -> None:
        async with listening(Engine()) as address:
            address = address.for_channel("a")
            channel = await Channel.connect(address, "a")
            with pytest.raises(TypeError):
                channel.call("echo", Bomb(exploded))
            bomb = pickle.dumps(Bomb(exploded))
            channel._transport.write(len(bomb).to_bytes(4) + channel._seal(b"caller", 0, bomb) + bomb)
            with pytest.raises(EngineLost):
                await asyncio.wait_for(channel.call("echo"), 10)
            channel.close()

    asyncio.run(main())
    assert not exploded.exists()


class Certificates:
    """Says in the environment which certificate an end shows: Ray's own, or one that nobody vouches for."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._monkeypatch = folder, monkeypatch
        for name in ("ray", "stranger"):
            made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
            files = ["-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem"]
            subprocess.run([*made, *files], check=True, capture_output=True, timeout=60)
        monkeypatch.setenv("RAY_USE_TLS", "1")
        monkeypatch.setenv("RAY_TLS_CA_CERT", str(folder / "ray.pem"))

    def of(self, name: str) -> None:
        self._monkeypatch.setenv("RAY_TLS_SERVER_CERT", str(self._folder / f"{name}.pem"))
        self._monkeypatch.setenv("RAY_TLS_SERVER_KEY", str(self._folder / f"{name}.key"))


@pytest.fixture
def certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Certificates:
    return Certificates(tmp_path, monkeypatch)


@pytest.mark.parametrize(("listens", "calls"), [("ray", "stranger"), ("stranger", "ray")])
def test_each_end_asks_for_a_certificate_of_rays(certificates: Certificates, listens: str, calls: str) -> None:
    """Also of one that knows the key."""

    async def main() -> None:
        certificates.of(listens)
        async with listening(Engine()) as address:
            certificates.of(calls)
            with pytest.raises(OSError):
                await asyncio.wait_for(Channel.connect(address.for_channel("a"), "a"), 10)

    asyncio.run(main())


def test_where_ray_uses_tls_the_channel_does(certificates: Certificates) -> None:
    async def main() -> None:
        certificates.of("ray")
        async with listening(Engine()) as address:
            async with (tap := Tapped(address.for_channel("a"))).between() as tapped:
                channel = await Channel.connect(tapped, "a")
                assert await channel.call("echo", "hello") == ("hello",)
                channel.close()
            assert b"hello" not in tap.sent

    asyncio.run(main())
