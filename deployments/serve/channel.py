"""Calls to another process over a connection that stays open, for the calls that a request makes every round.

A Ray actor call goes through several threads and two event loops on either side, and a round would make two. Here a
call is one message each way. Ray starts the processes, tells where they listen, and notices when one has died.

A channel has a name, so that the listener knows which channel ended.

A message is a pickle after its length. Unpickling can run any code, so a listener reads only from callers that know its
secret.
"""

import asyncio
import hmac
import itertools
import logging
import pickle
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rapid.errors import RapidError

logger = logging.getLogger("ray.serve")

Method = Callable[..., Awaitable[Any]]
Ended = Callable[[str], Awaitable[None]]

_SECRET_BYTES, _LENGTH_BYTES = 32, 8
_HELLO_S = 5.0  # to connect, and to say who one is
_GONE = (asyncio.IncompleteReadError, OSError)  # reading raises these when the other process is gone, or too late


@dataclass(frozen=True)
class Address:
    """Where a process listens. Every holder of the secret may call it, so an address is sent through Ray alone."""

    host: str
    port: int
    secret: bytes = field(repr=False)


class Listener:
    """Answers the callers that have its ``address``, many calls at once."""

    address: Address

    def __init__(self, methods: Mapping[str, Method], ended: Ended) -> None:
        self._methods, self._ended = methods, ended
        self._answering: set[asyncio.Task[None]] = set()  # asyncio itself keeps no task alive

    @classmethod
    async def start(cls, host: str, methods: Mapping[str, Method], *, ended: Ended) -> "Listener":
        """Listens on a free port of ``host``, for calls of ``methods`` by name.

        When a channel ends, for any reason, the listener calls ``ended`` with its name.
        """
        listener = cls(methods, ended)
        listener._server = await asyncio.start_server(listener._converse, host, 0)
        port = listener._server.sockets[0].getsockname()[1]
        listener.address = Address(host, port, secrets.token_bytes(_SECRET_BYTES))
        return listener

    def close(self) -> None:
        """Refuses new channels; open ones stay."""
        self._server.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name: str | None = None
        try:
            async with asyncio.timeout(_HELLO_S):
                if not hmac.compare_digest(await reader.readexactly(_SECRET_BYTES), self.address.secret):
                    return
                name = await _read(reader)
            while True:
                task = asyncio.create_task(self._answer(writer, *await _read(reader)))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)
        except _GONE:
            pass
        finally:
            writer.close()
            if name is not None:
                await self._ended(name)

    async def _answer(self, writer: asyncio.StreamWriter, number: int, name: str, args: tuple[Any, ...]) -> None:
        failed, outcome = False, None
        try:
            outcome = await self._methods[name](*args)
        except RapidError as error:
            failed, outcome = True, error
        except Exception as error:
            # Not every exception can be unpickled, and none carries its traceback.
            logger.exception("a call of %s failed", name)
            failed, outcome = True, RuntimeError(f"{type(error).__name__}: {error}")
        if not writer.is_closing():
            writer.write(_message((number, failed, outcome)))


class Channel:
    """Calls to the listener at an address. Many may be under way at once; they begin in order."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._listening = asyncio.create_task(self._listen(reader))
        self._listening.add_done_callback(self._end)

    @classmethod
    async def connect(cls, address: Address, name: str) -> "Channel":
        """
        Raises:
            OSError: no process listens there, or it does not answer within five seconds.
        """
        async with asyncio.timeout(_HELLO_S):
            reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(address.secret + _message(name))
        return cls(reader, writer)

    def call(self, method: str, *args: Any) -> asyncio.Future[Any]:
        """Sends the call at once. The future gets the method's result or its exception; a `ConnectionError` where the
        other process is gone or the channel is closed. A cancelled call is carried out all the same."""
        future = asyncio.get_running_loop().create_future()
        if self._listening.done():
            future.set_exception(_gone())
        else:
            number = next(self._numbers)
            self._waiting[number] = future
            self._writer.write(_message((number, method, args)))
        return future

    def close(self) -> None:
        """Fails the calls that are under way; harmless when the channel is closed already."""
        self._listening.cancel()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while True:
            number, failed, outcome = await _read(reader)
            future = self._waiting.pop(number)
            if future.cancelled():
                continue
            if failed:
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    def _end(self, listening: asyncio.Task[None]) -> None:
        if not listening.cancelled() and not isinstance(error := listening.exception(), _GONE):
            logger.error("a message cannot be read", exc_info=error)
        self._writer.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(_gone())


def _gone() -> ConnectionError:
    return ConnectionResetError("the other process is gone, or the channel to it is closed")


def _message(content: object) -> bytes:
    pickled = pickle.dumps(content, protocol=pickle.HIGHEST_PROTOCOL)
    return len(pickled).to_bytes(_LENGTH_BYTES) + pickled


async def _read(reader: asyncio.StreamReader) -> Any:
    length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES))
    return pickle.loads(await reader.readexactly(length))
