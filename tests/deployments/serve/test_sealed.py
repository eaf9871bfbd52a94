"""What was seen of a connection opens nothing and is not done again, whoever sends it and to whom."""

from __future__ import annotations

from functools import partial
from typing import Any

from deployments.serve.sealed import Sealed, be_greeted, greet

KEY = bytes(range(32))


class Wire:
    """A transport that remembers what is written."""

    def __init__(self) -> None:
        self.seen, self.is_closed = b"", False

    def write(self, data: bytes) -> None:
        self.seen += data

    def is_closing(self) -> bool:
        return self.is_closed

    def abort(self) -> None:
        self.is_closed = True


class End(Sealed):
    """One end of a connection; it remembers what it was told."""

    def __init__(self, *, is_caller: bool) -> None:
        greeting: Any = partial(greet, name="a", key=KEY) if is_caller else partial(be_greeted, key_of=lambda _: KEY)
        super().__init__(greeting, is_caller=is_caller)
        self.wire, self.heard, self.names = Wire(), list[Any](), list[str]()
        self.connection_made(self.wire)  # type: ignore[arg-type]

    def greeted(self, name: str) -> None:
        self.names.append(name)

    def received(self, message: Any) -> None:
        self.heard.append(message)

    @property
    def problem(self) -> str:
        return f"{type(self._problem).__name__}: {self._problem}"


def carry(sender: End, receiver: End, since: int = 0) -> int:
    """Brings what ``sender`` has written ``since`` then; how much that is by now."""
    receiver.data_received(sender.wire.seen[since:])
    return len(sender.wire.seen)


def conversation() -> tuple[End, End, int]:
    """Two ends that have greeted each other, and how many bytes the caller has written so far."""
    caller, listener = End(is_caller=True), End(is_caller=False)
    called = carry(caller, listener)
    carry(listener, caller)
    called = carry(caller, listener, called)
    assert caller.names == listener.names == ["a"]
    return caller, listener, called


def test_a_message_is_read_once_and_not_by_who_wrote_it() -> None:
    caller, listener, called = conversation()
    caller.write("do it")
    carry(caller, listener, called)
    assert listener.heard == ["do it"]
    for end in (listener, caller):
        carry(caller, end, called)
        assert "not written by the other end" in end.problem and end.wire.is_closed
    assert (listener.heard, caller.heard) == (["do it"], [])


def test_a_message_may_come_in_pieces_or_with_others() -> None:
    caller, listener, called = conversation()
    for message in ("one", ["two", b"x" * 5000], "three"):
        caller.write(message)
    for i in range(called, called + 50):
        listener.data_received(caller.wire.seen[i : i + 1])
    carry(caller, listener, called + 50)
    assert listener.heard == ["one", ["two", b"x" * 5000], "three"]


def test_a_greeting_that_was_seen_convinces_neither_end() -> None:
    caller, listener, _ = conversation()
    for seen, end in ((listener, End(is_caller=True)), (caller, End(is_caller=False))):
        carry(seen, end)
        assert "ConnectionRefusedError" in end.problem and not end.names


def test_a_length_that_no_message_has_ends_the_connection() -> None:
    """Before anything of that size is kept."""
    _, listener, _ = conversation()
    listener.data_received(b"\xff" * 36)
    assert "4294967295 bytes" in listener.problem and listener.wire.is_closed
