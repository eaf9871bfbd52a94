"""A proxy that gives up, as those in front of servers do: it ends a connection on which the server was silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass
class Proxy:
    """Passes bytes on to ``port``. After ``silence_s`` without a byte from there the client's connection is aborted.

    Attributes:
        longest_s: the longest silence of the server that was seen, while a client waited.
        given_up: how many connections were aborted.
    """

    port: int
    silence_s: float
    longest_s: float = 0.0
    given_up: int = 0

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Yields the port that the proxy listens on."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self.port)
        sending = asyncio.create_task(_pass_on(reader, to_server))
        try:
            while data := await self._heard(from_server):
                writer.write(data)
                await writer.drain()
        except TimeoutError:
            self.given_up += 1
            writer.transport.abort()
        except ConnectionError:
            pass  # the client has left
        finally:
            sending.cancel()
            to_server.close()
            writer.close()

    async def _heard(self, reader: asyncio.StreamReader) -> bytes:
        """The next bytes; empty where the server has closed the connection.

        Raises:
            TimeoutError: there were none for ``silence_s``.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(self.silence_s):
                return await reader.read(2**16)
        finally:
            self.longest_s = max(self.longest_s, loop.time() - began)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(2**16):
        writer.write(data)
        await writer.drain()
