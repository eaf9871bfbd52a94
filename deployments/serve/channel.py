"""Calls to another process over a connection that stays open, for the calls that a request makes every round.

A Ray actor call goes through several threads and two event loops on either side, and a round would make two. Here a
call is one message each way. Ray starts the processes, tells where they listen, and notices when one has died.

A channel has a name, so that the listener knows which channel ended, and whose calls these are: each name has a key of
its own, which `deployments.serve.sealed` never sends.
"""

import asyncio
import itertools
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from deployments.serve.sealed import GONE, KEY_BYTES, Sealed, be_greeted, derived, greet, tls
from rapid.errors import RapidError

logger = logging.getLogger("ray.serve")

Method = Callable[..., Awaitable[Any]]
Ended = Callable[[str], Awaitable[None]]

_HELLO_S = 5.0  # to connect, and to say who one is


@dataclass(frozen=True)
class Address:
    """Where a process listens. Who holds the secret may call it, so an address is sent through Ray alone.

    A listener's own address is for its owner, who makes of it one `for_channel`.
    """

    host: str
    port: int
    secret: bytes = field(repr=False)

    def for_channel(self, name: str) -> "Address":
        """The address for one channel, whose secret opens no other."""
        return replace(self, secret=derived(self.secret, name))


class Listener:
    """Answers the callers that have its ``address``, many calls at once."""

    address: Address

    def __init__(self, methods: Mapping[str, Method], ended: Ended) -> None:
        self._methods, self._ended = methods, ended
        self._answering: set[asyncio.Task[None]] = set()  # asyncio itself keeps no task alive

    @classmethod
    async def start(cls, host: str, methods: Mapping[str, Method], *, ended: Ended) -> "Listener":
        """Listens on a free port of ``host``, for calls of ``methods`` by name.

        A method's first argument is the name of the channel, which its caller has shown to be its own. When a channel
        ends, for any reason, the listener calls ``ended`` with its name.
        """
        listener = cls(methods, ended)
        listener._server = await asyncio.start_server(listener._converse, host, 0, ssl=tls(is_caller=False))
        port = listener._server.sockets[0].getsockname()[1]
        listener.address = Address(host, port, secrets.token_bytes(KEY_BYTES))
        return listener

    def close(self) -> None:
        """Refuses new channels; open ones stay."""
        self._server.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name: str | None = None
        try:
            async with asyncio.timeout(_HELLO_S):
                name, connection = await be_greeted(reader, writer, lambda of: derived(self.address.secret, of))
            while True:
                task = asyncio.create_task(self._answer(name, connection, *await connection.read()))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)
        except GONE:
            pass
        except ValueError:
            logger.exception("a message on the channel %s cannot be read", name)
        finally:
            writer.close()
            if name is not None:
                await self._ended(name)

    async def _answer(self, channel: str, connection: Sealed, number: int, name: str, args: list[Any]) -> None:
        try:
            answer = [number, None, await self._methods[name](channel, *args)]
        except RapidError as error:
            answer = [number, error, None]
        except Exception as error:
            logger.exception("a call of %s failed", name)
            answer = [number, f"{type(error).__name__}: {error}", None]  # only errors of ours travel as they are
        if not connection.writer.is_closing():
            try:
                connection.write(answer)
            except TypeError as error:
                logger.exception("the answer to a call of %s does not travel", name)
                connection.write([number, str(error), None])


class Channel:
    """Calls to the listener at an address. Many may be under way at once; they begin in order."""

    def __init__(self, connection: Sealed) -> None:
        self._connection = connection
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._listening = asyncio.create_task(self._listen())
        self._listening.add_done_callback(self._end)

    @classmethod
    async def connect(cls, address: Address, name: str, within_s: float = _HELLO_S) -> "Channel":
        """``address`` is the one for this channel.

        Raises:
            OSError: no process listens there that knows the secret, or it does not answer ``within_s``.
        """
        async with asyncio.timeout(within_s):
            reader, writer = await asyncio.open_connection(address.host, address.port, ssl=tls(is_caller=True))
            try:
                return cls(await greet(reader, writer, name, address.secret))
            except BaseException:
                writer.close()
                raise

    def call(self, method: str, *args: Any) -> asyncio.Future[Any]:
        """Sends the call at once. The future gets the method's result or its exception; a `ConnectionError` where the
        other process is gone or the channel is closed. A cancelled call is carried out all the same."""
        future = asyncio.get_running_loop().create_future()
        if self._listening.done():
            future.set_exception(_gone())
        else:
            number = next(self._numbers)
            self._connection.write([number, method, list(args)])
            self._waiting[number] = future
        return future

    def close(self) -> None:
        """Fails the calls that are under way; harmless when the channel is closed already."""
        self._listening.cancel()

    async def _listen(self) -> None:
        while True:
            number, error, result = await self._connection.read()
            future = self._waiting.pop(number)
            if future.cancelled():
                continue
            if error is not None:
                future.set_exception(error if isinstance(error, RapidError) else RuntimeError(error))
            else:
                future.set_result(result)

    def _end(self, listening: asyncio.Task[None]) -> None:
        if not listening.cancelled() and not isinstance(error := listening.exception(), GONE):
            logger.error("a message cannot be read", exc_info=error)
        self._connection.writer.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(_gone())


def _gone() -> ConnectionError:
    return ConnectionResetError("the other process is gone, or the channel to it is closed")
