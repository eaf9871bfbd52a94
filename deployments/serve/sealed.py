"""A connection between two processes that know the same key, which itself never travels.

Each end shows that it knows the key: it computes an HMAC over a number of each end, used once. Every message has its
number and a seal, an HMAC again, so that nobody on the way puts one in, changes one or sends one again. They are not
encrypted: that is what TLS is for, with Ray's own certificates where Ray uses them (RAY_USE_TLS).
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import os
import secrets
import ssl
from collections.abc import Callable
from typing import Any

from deployments.serve.codec import pack, unpack

KEY_BYTES = 32
GONE = (asyncio.IncompleteReadError, OSError)  # reading raises these when the other process is gone, or too late
_NONCE_BYTES, _LENGTH_BYTES, _NUMBER_BYTES = 32, 4, 8
_MAX_BYTES = 256 * 2**20  # of a message
_DIGEST = "sha256"
_SEAL_BYTES = 32
_CALLER, _LISTENER, _MESSAGES = b"caller", b"listener", b"messages"


class Sealed:
    """One end of a connection, behind its greeting. Messages are read in the order in which they were written."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes, *, is_caller: bool
    ) -> None:
        self._reader, self.writer, self._key = reader, writer, key
        self._ours, self._theirs = (_CALLER, _LISTENER) if is_caller else (_LISTENER, _CALLER)
        self._written, self._read = itertools.count(), itertools.count()

    def write(self, message: object) -> None:
        """Sends ``message`` (`deployments.serve.codec.pack`)."""
        body = pack(message)
        if len(body) > _MAX_BYTES:
            raise ValueError(f"a message of {len(body)} bytes does not travel; at most {_MAX_BYTES} do")
        self.writer.write(len(body).to_bytes(_LENGTH_BYTES) + self._seal(self._ours, next(self._written), body) + body)

    async def read(self) -> Any:
        """The next message.

        Raises:
            OSError, IncompleteReadError: the other end is gone, or somebody else has written.
            ValueError: the other end is of another version.
        """
        length = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES))
        if length > _MAX_BYTES:
            raise ConnectionAbortedError(f"a message is said to have {length} bytes")
        seal = await self._reader.readexactly(_SEAL_BYTES)
        body = await self._reader.readexactly(length)
        if not hmac.compare_digest(seal, self._seal(self._theirs, next(self._read), body)):
            raise ConnectionAbortedError("a message was not written by the other end")
        return unpack(body)

    def _seal(self, who: bytes, number: int, body: bytes) -> bytes:
        return hmac.digest(self._key, who + number.to_bytes(_NUMBER_BYTES) + body, _DIGEST)


def derived(key: bytes, name: str) -> bytes:
    """A key for ``name`` alone: who has it learns nothing of ``key``."""
    return hmac.digest(key, name.encode(), _DIGEST)


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str, key: bytes) -> Sealed:
    """The caller's greeting: it says its ``name`` and shows that it has the name's ``key``.

    Raises:
        OSError: the listener does not have the key, or is gone.
    """
    mine, called = secrets.token_bytes(_NONCE_BYTES), name.encode()
    writer.write(mine + len(called).to_bytes() + called)
    try:
        theirs = await reader.readexactly(_NONCE_BYTES)
        shown = await reader.readexactly(_SEAL_BYTES)
    except asyncio.IncompleteReadError as error:
        raise ConnectionResetError("the listener ended the greeting") from error
    if not hmac.compare_digest(shown, _shown(key, _LISTENER, mine, theirs)):
        raise ConnectionRefusedError("who listens there does not know the key")
    writer.write(_shown(key, _CALLER, mine, theirs))
    return Sealed(reader, writer, _shown(key, _MESSAGES, mine, theirs), is_caller=True)


async def be_greeted(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key_of: Callable[[str], bytes]
) -> tuple[str, Sealed]:
    """The listener's part: (the caller's name, the connection).

    Raises:
        OSError, IncompleteReadError: the caller does not have its name's key, or is gone.
    """
    theirs = await reader.readexactly(_NONCE_BYTES)
    length = (await reader.readexactly(1))[0]
    name = (await reader.readexactly(length)).decode("utf-8", "replace")
    key, mine = key_of(name), secrets.token_bytes(_NONCE_BYTES)
    writer.write(mine + _shown(key, _LISTENER, theirs, mine))
    if not hmac.compare_digest(await reader.readexactly(_SEAL_BYTES), _shown(key, _CALLER, theirs, mine)):
        raise ConnectionRefusedError("the caller does not know the key")
    return name, Sealed(reader, writer, _shown(key, _MESSAGES, theirs, mine), is_caller=False)


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
