"""A connection between two processes that know the same key, which itself never travels.

Each end shows that it knows the key: it computes an HMAC over a number of each end, used once. Every message has its
number and a seal, a keyed BLAKE2b, so that nobody on the way puts one in, changes one or sends one again. They are not
encrypted: that is what TLS is for, with Ray's own certificates where Ray uses them (RAY_USE_TLS).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import itertools
import os
import secrets
import ssl
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, cast

from deployments.serve.codec import pack, unpack

KEY_BYTES = 32
_NONCE_BYTES, _LENGTH_BYTES, _NUMBER_BYTES = 32, 4, 8
_MAX_BYTES = 256 * 2**20  # of a message
_DIGEST = "sha256"
_SEAL_BYTES = 32  # as many as an HMAC has
_CALLER, _LISTENER, _MESSAGES = b"caller", b"listener", b"messages"


class Greeted(NamedTuple):
    """What both ends know behind the greeting: the caller's name, and a key of this connection alone."""

    name: str
    key: bytes


Write = Callable[[bytes], None]
Greeting = Generator[int, bytes, Greeted]  # it yields how many bytes it wants next, and gets them


class Sealed(asyncio.Protocol):
    """One end of a connection: a greeting, then messages, in the order in which they were written.

    The loop calls it with whatever has come, and a whole message is handed on at once. A stream's reader would be
    awaited three times for each, and awaiting costs more than a small message does.

    A subclass says what happens then: `greeted`, `received` for each message, and `ended` once. A message that the
    other end did not write ends the connection, and so does an error of one of these.
    """

    def __init__(self, greeting: Callable[[Write], Greeting], *, is_caller: bool) -> None:
        self._greeting = greeting
        self._ours, self._theirs = (_CALLER, _LISTENER) if is_caller else (_LISTENER, _CALLER)
        self._written = itertools.count()
        self._unread = bytearray()
        self._problem: Exception | None = None

    def greeted(self, name: str) -> None:
        """Each end has shown that it knows the key of ``name``, the caller's."""

    def received(self, message: Any) -> None:
        """The other end has written ``message``."""

    def ended(self, problem: Exception | None) -> None:
        """The connection has ended; None if one of the ends closed it."""

    def write(self, message: object) -> None:
        """Sends ``message`` (`deployments.serve.codec.pack`), unless the connection has ended.

        Raises:
            TypeError, ValueError: the message does not travel.
        """
        body = pack(message)
        if len(body) > _MAX_BYTES:
            raise ValueError(f"a message of {len(body)} bytes does not travel; at most {_MAX_BYTES} do")
        if not self._transport.is_closing():
            seal = self._seal(self._ours, next(self._written), body)
            self._transport.write(len(body).to_bytes(_LENGTH_BYTES) + seal + body)

    @property
    def is_closing(self) -> bool:
        """Whether nothing can be written any more."""
        return self._transport.is_closing()

    def abort(self, problem: Exception | None = None) -> None:
        """Ends the connection at once, because of ``problem``."""
        self._problem = self._problem or problem
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._reading = self._read()
        self._wanted = next(self._reading)

    def data_received(self, data: bytes) -> None:
        self._unread += data
        try:
            while len(self._unread) >= self._wanted and not self._transport.is_closing():
                piece = bytes(self._unread[: self._wanted])
                del self._unread[: self._wanted]
                self._wanted = self._reading.send(piece)
        except Exception as error:
            self.abort(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended(self._problem or exc)

    def _read(self) -> Generator[int, bytes, None]:
        """All that comes: yields how many bytes it wants next, and gets them."""
        name, self._key = yield from self._greeting(self._transport.write)
        self.greeted(name)
        for number in itertools.count():
            head = yield _LENGTH_BYTES + _SEAL_BYTES
            length = int.from_bytes(head[:_LENGTH_BYTES])
            if length > _MAX_BYTES:
                raise ConnectionAbortedError(f"a message is said to have {length} bytes")
            body = yield length
            if not hmac.compare_digest(head[_LENGTH_BYTES:], self._seal(self._theirs, number, body)):
                raise ConnectionAbortedError("a message was not written by the other end")
            self.received(unpack(body))

    def _seal(self, who: bytes, number: int, body: bytes) -> bytes:
        # Not an HMAC, which goes through OpenSSL: where a round wakes processes that slept, that costs three times as
        # much. BLAKE2 takes a key itself (RFC 7693, 2.9).
        numbered = number.to_bytes(_NUMBER_BYTES) + body
        return hashlib.blake2b(numbered, digest_size=_SEAL_BYTES, key=self._key, person=who).digest()


def derived(key: bytes, name: str) -> bytes:
    """A key for ``name`` alone: who has it learns nothing of ``key``."""
    return hmac.digest(key, name.encode(), _DIGEST)


def greet(write: Write, name: str, key: bytes) -> Greeting:
    """The caller's greeting: it says its ``name`` and shows that it has the name's ``key``.

    Raises:
        ConnectionRefusedError: the listener does not have the key.
    """
    mine, called = secrets.token_bytes(_NONCE_BYTES), name.encode()
    write(mine + len(called).to_bytes() + called)
    theirs = yield _NONCE_BYTES
    shown = yield _SEAL_BYTES
    if not hmac.compare_digest(shown, _shown(key, _LISTENER, mine, theirs)):
        raise ConnectionRefusedError("who listens there does not know the key")
    write(_shown(key, _CALLER, mine, theirs))
    return Greeted(name, _shown(key, _MESSAGES, mine, theirs))


def be_greeted(write: Write, key_of: Callable[[str], bytes]) -> Greeting:
    """The listener's part.

    Raises:
        ConnectionRefusedError: the caller does not have its name's key.
    """
    theirs = yield _NONCE_BYTES
    length = yield 1
    name = (yield length[0]).decode("utf-8", "replace")
    key, mine = key_of(name), secrets.token_bytes(_NONCE_BYTES)
    write(mine + _shown(key, _LISTENER, theirs, mine))
    shown = yield _SEAL_BYTES
    if not hmac.compare_digest(shown, _shown(key, _CALLER, theirs, mine)):
        raise ConnectionRefusedError("the caller does not know the key")
    return Greeted(name, _shown(key, _MESSAGES, theirs, mine))


def _shown(key: bytes, what: bytes, of_caller: bytes, of_listener: bytes) -> bytes:
    return hmac.digest(key, what + of_caller + of_listener, _DIGEST)


def tls(*, is_caller: bool) -> ssl.SSLContext | None:
    """Ray's certificates, where Ray uses TLS between its own processes; each end asks for the other's."""
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    purpose = ssl.Purpose.SERVER_AUTH if is_caller else ssl.Purpose.CLIENT_AUTH
    context = ssl.create_default_context(purpose, cafile=os.environ["RAY_TLS_CA_CERT"])
    context.check_hostname = False  # processes know each other by address
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(os.environ["RAY_TLS_SERVER_CERT"], os.environ["RAY_TLS_SERVER_KEY"])
    return context
