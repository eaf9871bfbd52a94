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
from functools import partial
from typing import Any

from deployments.serve.sealed import KEY_BYTES, Sealed, be_greeted, derived, greet, tls
from rapid.errors import EngineLost, RapidError, SequenceClosed

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

    @classmethod
    async def start(cls, host: str, methods: Mapping[str, Method], *, ended: Ended) -> "Listener":
        """Listens on a free port of ``host``, for calls of ``methods`` by name.

        A method's first argument is the name of the channel, which its caller has shown to be its own. When a channel
        ends, for any reason, the listener calls ``ended`` with its name.
        """
        listener, context = cls(methods, ended), tls(is_caller=False)
        listener._server = await asyncio.get_running_loop().create_server(
            listener._meet, host, 0, ssl=context, ssl_handshake_timeout=_HELLO_S if context else None
        )
        port = listener._server.sockets[0].getsockname()[1]
        listener.address = Address(host, port, secrets.token_bytes(KEY_BYTES))
        return listener

    def close(self) -> None:
        """Refuses new channels; open ones stay."""
        self._server.close()

    def _meet(self) -> "_Answers":
        return _Answers(self.address.secret, self._methods, self._ended)


class _Answers(Sealed):
    """The listener's end of a channel."""

    _name: str | None = None

    def __init__(self, secret: bytes, methods: Mapping[str, Method], ended: Ended) -> None:
        super().__init__(lambda write: be_greeted(write, lambda name: derived(secret, name)), is_caller=False)
        self._methods, self._tell = methods, ended
        self._hello = asyncio.get_running_loop().call_later(_HELLO_S, self.abort)
        self._under_way = set[asyncio.Future[Any]]()  # asyncio itself keeps no task alive

    def greeted(self, name: str) -> None:
        self._hello.cancel()
        self._name = name

    def received(self, message: Any) -> None:
        number, method, args = message
        try:
            answer = asyncio.ensure_future(self._methods[method](self._name, *args))
        except Exception as error:
            self._fail(number, method, error)
        else:
            self._under_way.add(answer)
            answer.add_done_callback(partial(self._answered, number, method))

    def ended(self, problem: Exception | None) -> None:
        self._hello.cancel()
        _log(problem)
        if self._name is not None:
            telling = asyncio.ensure_future(self._tell(self._name))
            self._under_way.add(telling)
            telling.add_done_callback(self._under_way.discard)

    def _answered(self, number: int, method: str, answer: asyncio.Future[Any]) -> None:
        self._under_way.discard(answer)
        if answer.cancelled():
            self._fail(number, method, SequenceClosed(f"the call of {method} was cancelled"))
        elif error := answer.exception():
            self._fail(number, method, error)
        else:
            try:
                self.write([number, None, answer.result()])
            except (TypeError, ValueError) as error:
                logger.exception("the answer to a call of %s does not travel", method)
                self.write([number, str(error), None])

    def _fail(self, number: int, method: str, error: BaseException) -> None:
        if isinstance(error, RapidError):  # only errors of ours travel as they are
            self.write([number, error, None])
        else:
            logger.error("a call of %s failed", method, exc_info=error)
            self.write([number, f"{type(error).__name__}: {error}", None])


class Channel(Sealed):
    """Calls to the listener at an address. Many may be under way at once; they begin in order."""

    def __init__(self, address: Address, name: str) -> None:
        super().__init__(lambda write: greet(write, name, address.secret), is_caller=True)
        self._numbers = itertools.count()
        self._greeted = asyncio.get_running_loop().create_future()
        self._waiting: dict[int, asyncio.Future[Any]] = {}

    @classmethod
    async def connect(cls, address: Address, name: str, within_s: float = _HELLO_S) -> "Channel":
        """``address`` is the one for this channel.

        Raises:
            OSError: no process listens there that knows the secret, or it does not answer ``within_s``.
        """
        loop, channel = asyncio.get_running_loop(), cls(address, name)
        async with asyncio.timeout(within_s):
            await loop.create_connection(lambda: channel, address.host, address.port, ssl=tls(is_caller=True))
            try:
                await channel._greeted
            except BaseException:
                channel.abort()
                raise
        return channel

    def call(self, method: str, *args: Any) -> asyncio.Future[Any]:
        """Sends the call at once. The future gets the method's result or its exception; EngineLost where the other
        process is gone or the channel is closed. A cancelled call is carried out all the same."""
        answer = asyncio.get_running_loop().create_future()
        if self.is_closing:
            answer.set_exception(_gone())
        else:
            number = next(self._numbers)
            self.write([number, method, list(args)])
            self._waiting[number] = answer
        return answer

    def close(self) -> None:
        """Fails the calls that are under way; harmless when the channel is closed already."""
        self.abort()  # a process that hangs would never read the rest
        self._fail_all()

    def greeted(self, name: str) -> None:
        if not self._greeted.done():
            self._greeted.set_result(None)

    def received(self, message: Any) -> None:
        number, error, result = message
        answer = self._waiting.pop(number)
        if answer.cancelled():
            return
        if error is not None:
            answer.set_exception(error if isinstance(error, RapidError) else RuntimeError(error))
        else:
            answer.set_result(result)

    def ended(self, problem: Exception | None) -> None:
        if not self._greeted.done():
            self._greeted.set_exception(problem or ConnectionResetError("the listener ended the greeting"))
        _log(problem)
        self._fail_all()

    def _fail_all(self) -> None:
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(_gone())
        self._waiting.clear()


def _gone() -> EngineLost:
    return EngineLost("the engine is gone")


def _log(problem: Exception | None) -> None:
    """What ended a connection, unless the other process did, or the network between."""
    if problem is not None and not isinstance(problem, OSError):
        logger.error("a message cannot be read", exc_info=problem)
