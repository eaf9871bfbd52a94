"""What was seen of a connection opens nothing and is not done again, whoever sends it and to whom."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from deployments.serve.sealed import Sealed, be_greeted, greet

KEY = bytes(range(32))


class Wire:
    """A writer whose bytes come to a reader; it remembers them."""

    def __init__(self, to: asyncio.StreamReader | None = None) -> None:
        self.to, self.seen = to, b""

    def write(self, data: bytes) -> None:
        self.seen += data
        if self.to is not None:
            self.to.feed_data(data)


def end(reader: Any, writer: Any, *, is_caller: bool) -> Sealed:
    return Sealed(reader, writer, KEY, is_caller=is_caller)


def test_a_message_is_read_once_and_not_by_who_wrote_it() -> None:
    async def main() -> None:
        wire = Wire()
        end(None, wire, is_caller=True).write("do it")
        for is_caller, expected in ((False, ["do it"]), (True, [])):
            reader = asyncio.StreamReader()
            reader.feed_data(2 * wire.seen)
            reading = end(reader, None, is_caller=is_caller)
            for message in expected:
                assert await reading.read() == message
            with pytest.raises(ConnectionAbortedError, match="not written by the other end"):
                await reading.read()

    asyncio.run(main())


def test_a_greeting_that_was_seen_convinces_neither_end() -> None:
    async def main() -> None:
        to_caller, to_listener = asyncio.StreamReader(), asyncio.StreamReader()
        called, heard = Wire(to_listener), Wire(to_caller)
        ours, (name, theirs) = await asyncio.gather(
            greet(to_caller, called, "a", KEY),  # type: ignore[arg-type]
            be_greeted(to_listener, heard, lambda _: KEY),  # type: ignore[arg-type]
        )
        ours.write("hello")
        assert (name, await theirs.read()) == ("a", "hello")

        for again, meet in (
            (heard.seen, lambda reader: greet(reader, Wire(), "a", KEY)),  # type: ignore[arg-type]
            (called.seen, lambda reader: be_greeted(reader, Wire(), lambda _: KEY)),  # type: ignore[arg-type]
        ):
            reader = asyncio.StreamReader()
            reader.feed_data(again)
            with pytest.raises(ConnectionRefusedError):
                await meet(reader)

    asyncio.run(main())
