"""Malformed requests without end, made from an OpenAPI description, and the server's answers to them."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

DEADLINE_S = 30.0
PAUSE_S = 0.05  # between the pieces of a slow body
AT_ONCE = 16

# JSON for one value. Some of these are not JSON, and some are valid for some fields.
VALUES = (
    *("null", "true", "-1", "0", "1e-320", "9223372036854775808", "1e999", "9" * 400, "9" * 5000, "NaN", "-Infinity"),
    *(
        '""',
        '"a"',
        '"\\ud800"',
        '"\\udc00\\ud800"',
        '"\\u0000"',
        '"👩‍🚀"',
        '"' + "é" * 300 + '"',
        "'a'",
        "01",
        "undefined",
    ),
    *("[]", "{}", "[[]]", "[null]", '{"a": 1}', '[{"role": "user"}]', '{"type": "image_url"}'),
    *("[" * 100_000, "[" * 150 + "]" * 150, '{"a":' * 100_000, '{"a":' * 100 + "1" + "}" * 100),
)
CONTENT_TYPES = ("", "text/plain", "multipart/form-data", "multipart/form-data; boundary=x", "a/b; charset=\x01")
METHODS = ("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE", "BREW")
PATH_ENDS = ("/", "/x", "%00", "/../..", "%ff", "?model=%ud800", ";a", "//", "?" + "a" * 5000)
FILES = (b"abc", b"", b"\xff\xfe", b"a\0b", b"PK\x03\x04", b"%PDF-1.7\n", b"<html><p>" * 300, b"\xef\xbb\xbf")
NAMES = (b"Purpose", b'"', b"\xff", b"a" * 5000, "é".encode(), b'x"; filename="a', b"file\0")
BOUNDARY = b"--x\r\n"
FIELDS = {b"file": b"abc", b"data": b"abc", b"purpose": b"user_data"}  # of forms that are valid
PATH_VALUES = ("a", "-1", "%00", "..%2f..%2fetc%2fpasswd", "%ed%a0%80", "a" * 3000)


class Attack(NamedTuple):
    """One malformed request. The client sends ``pieces`` slowly; with ``cut`` it disconnects before the body ends."""

    kind: str
    method: str
    path: str
    content_type: str
    pieces: list[bytes]
    cut: bool = False


class Attacker:
    """Makes attacks on the operations that ``openapi`` describes; the same ``seed`` makes the same attacks."""

    def __init__(self, openapi: dict[str, Any], model: str, seed: int) -> None:
        self._chance, self._model = random.Random(seed), model
        self._schemas: dict[str, Any] = openapi.get("components", {}).get("schemas", {})
        self._operations: list[tuple[str, str, dict[str, Any]]] = []
        self._queries: list[tuple[str, str, list[str]]] = []
        for path, methods in openapi["paths"].items():
            for method, operation in methods.items():
                content = operation.get("requestBody", {}).get("content", {})
                self._operations.append((method.upper(), path, content))
                if names := [it["name"] for it in operation.get("parameters", ()) if it["in"] == "query"]:
                    self._queries.append((method.upper(), path, names))
        self._makers = {
            "truncated": self._truncated,
            "wrong value": self._wrong_value,
            "unknown field": lambda body: (
                b'{"%s": 1, ' % self._pick(b"", b"Model", "é".encode(), b"a" * 5000) + body[1:]
            ),
            "duplicated key": lambda body: body[:-1] + b", " + body[1:],
            "nested deeply": lambda _: self._pick(b"[", b'{"a":', b'{"messages":[') * self._pick(200, 100_000),
            "invalid UTF-8": lambda body: self._spliced(body, self._pick(b"\xff", b"\xc0\x80", b"\xed\xa0\x80")),
            "flipped bytes": lambda body: self._spliced(body, self._chance.randbytes(3)),
            "giant string": self._giant,
            "no object": lambda _: self._pick(*VALUES).encode(),
            "no JSON": lambda _: self._chance.randbytes(self._chance.randrange(200)),
        }
        self._form_makers = {
            "wrong value": lambda body: self._with_part(body, self._part(self._pick(*FIELDS))),
            "unknown field": lambda body: self._with_part(body, self._part(self._pick(*NAMES))),
            "duplicated key": lambda body: self._with_part(body, self._pick(*body.split(BOUNDARY)[1:])),
            "giant string": lambda body: self._with_part(body, self._part(b"purpose", b"ab " * 500_000)),
        }

    def attacks(self, count: int) -> Iterator[Attack]:
        """``count`` attacks, equally many of each kind."""
        kinds = [*self._makers, *("wrong content type", "unknown method", "unknown path", "cut off", "slow")]
        kinds += ["wrong query"] if self._queries else []
        return (self._attack(kinds[number % len(kinds)]) for number in range(count))

    def _attack(self, kind: str) -> Attack:
        method, path, contents = self._pick(*(operation for operation in self._operations if operation[2]))
        content_type, body = self._body(contents)
        if kind == "wrong content type":
            content_type = self._pick(*CONTENT_TYPES)
        elif kind == "unknown method":
            method, path = self._pick(*METHODS), self._pick(*self._operations)[1]
        elif kind == "unknown path":
            method, path, contents = self._pick(*self._operations)
            path += self._pick("", *PATH_ENDS) if "{" in path else self._pick(*PATH_ENDS)
        elif kind == "wrong query":
            method, path, names = self._pick(*self._queries)
            content_type, body = "", b""
            path = f"{path}?" + "&".join(self._query(self._pick(*names)) for _ in range(self._pick(1, 3)))
        path = re.sub(r"\{\w+\}", lambda _: self._pick(*PATH_VALUES), path)
        makers = self._makers | (self._form_makers if "multipart/form-data" in contents else {})
        made = makers[kind](body) if kind in makers else body
        step = max(1, len(made) // 4) if kind == "slow" else max(1, len(made))
        pieces = [made[start : start + step] for start in range(0, len(made), step)]
        return Attack(kind, method, path, content_type, pieces, cut=kind == "cut off")

    def _pick(self, *choices: Any) -> Any:
        return self._chance.choice(choices)

    def _truncated(self, body: bytes) -> bytes:
        return body[: self._chance.randrange(len(body))]

    def _spliced(self, body: bytes, piece: bytes) -> bytes:
        at = self._chance.randrange(len(body))
        return body[:at] + piece + body[at + len(piece) :]

    def _giant(self, body: bytes) -> bytes:
        return self._wrong_value(body, '"' + "ab " * self._chance.randrange(1000, 50_000) + '"')

    def _wrong_value(self, body: bytes, value: str | None = None) -> bytes:
        """``body`` with one of its values, at any depth, replaced."""
        try:
            whole = json.loads(body)
        except ValueError:
            return body + (value or self._pick(*VALUES)).encode()
        if not (places := list(_places(whole))):
            return (value or self._pick(*VALUES)).encode()
        container, key = self._pick(*places)
        container[key] = "@here@"
        return json.dumps(whole).replace('"@here@"', value or self._pick(*VALUES)).encode()

    def _query(self, name: str) -> str:
        value = self._pick("", "-1", "0", "1", "abc", "ASC", "1e3", "9" * 5000, "\0", "é", "%ff", "%", "[]")
        return f"{name}={value if value[:1] == '%' else quote(value)}"

    def _body(self, contents: dict[str, Any]) -> tuple[str, bytes]:
        """(content type, body) of a valid request; the body is empty if the operation has none."""
        if not contents:
            return "", b""
        if "multipart/form-data" in contents:
            fields = contents["multipart/form-data"]["schema"]["properties"]
            parts = [self._part(name, value) for name, value in FIELDS.items() if name.decode() in fields]
            return "multipart/form-data; boundary=x", BOUNDARY + BOUNDARY.join(parts) + b"--x--\r\n"
        [(content_type, described)] = contents.items()
        return content_type, json.dumps(self._example(described["schema"])).encode()

    def _part(self, name: bytes, value: bytes | None = None) -> bytes:
        """A form's field, or a file if ``name`` is that of one, behind a boundary."""
        filename = b'; filename="%s"' % self._pick(b"a", b"a.pdf", b"../a", b"") if name in (b"file", b"data") else b""
        value = self._pick(*FILES, *map(str.encode, VALUES[:20])) if value is None else value
        return b'Content-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (name, filename, value)

    def _with_part(self, body: bytes, part: bytes) -> bytes:
        """``body`` with one more part, or with ``part`` in the place of another."""
        head, *parts = body.removesuffix(b"--x--\r\n").split(BOUNDARY)
        at = self._chance.randrange(len(parts))
        parts[at : at + self._pick(0, 1)] = [part.removesuffix(b"--x--\r\n")]
        return head + BOUNDARY + BOUNDARY.join(parts) + b"--x--\r\n"

    def _example(self, schema: dict[str, Any]) -> Any:
        """A value that ``schema`` allows, with some of the optional fields."""
        if "$ref" in schema:
            return self._example(self._schemas[schema["$ref"].rpartition("/")[2]])
        if "const" in schema or "enum" in schema:
            return self._pick(*schema.get("enum", [schema.get("const")]))
        if "anyOf" in schema:
            return self._example(self._pick(*(it for it in schema["anyOf"] if it.get("type") != "null")))
        kind = schema.get("type", "object")
        if kind == "object":
            fields = schema.get("properties", {})
            always = {*schema.get("required", ()), "max_tokens"}  # a body that is valid by chance should write little
            wanted = [f for f in fields if f in always or self._chance.random() < 0.3]
            return {f: self._model if f == "model" else self._example(fields[f]) for f in wanted}
        if kind == "array":
            return [self._example(schema.get("items", {}))]
        return {"string": "abc", "integer": 1, "number": 0.5, "boolean": self._pick(True, False)}.get(kind)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from _places(inner)


class Outcome:
    """The result of attacks: a count of every status, and the problems."""

    def __init__(self) -> None:
        self.statuses: dict[str, Counter[str]] = {}
        self.problems: list[str] = []

    def note(self, attack: Attack, answer: bytes | None) -> None:
        """Counts one answer; ``answer`` None means that it did not come in time."""
        status, problem = _judge(attack, answer)
        self.statuses.setdefault(attack.kind, Counter())[status] += 1
        if problem:
            body = b"".join(attack.pieces)
            sent = f"{attack.method} {attack.path} [{attack.content_type}] {body[:200]!r} ({len(body)} bytes)"
            self.problems.append(f"{attack.kind}: {problem}: {sent}")


def _judge(attack: Attack, answer: bytes | None) -> tuple[str, str | None]:
    """(the status, the problem or None). A client that cuts the connection gets no answer."""
    if attack.cut:
        return "cut off", None
    if not answer:
        return "none", "no answer in time" if answer is None else "the connection was closed without an answer"
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1].decode()
    if status >= "500":
        return status, f"{status} {body[:200]!r}"
    if b"internal_error" in body:
        return status, "an internal error in a stream"
    below_the_application = body == b"Invalid HTTP request received."
    if status >= "400" and attack.method != "HEAD" and not below_the_application:
        try:
            assert json.loads(body)["error"]["message"]
        except (ValueError, KeyError, TypeError, AssertionError):
            return status, f"not an error object: {body[:200]!r}"
    return status, None


async def strike(url: str, attacks: Iterable[Attack]) -> Outcome:
    """Sends all ``attacks``, a few at a time, each on a connection of its own."""
    outcome, left = Outcome(), iter(attacks)

    async def worker() -> None:
        for attack in left:
            try:
                async with asyncio.timeout(DEADLINE_S):
                    answer = await _send(url, attack)
            except TimeoutError:
                answer = None
            outcome.note(attack, answer)

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    return outcome


async def _send(url: str, attack: Attack) -> bytes:
    """The whole answer; nothing when the server closes the connection. httpx would refuse to send some attacks."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    length = sum(map(len, attack.pieces)) + (10 if attack.cut else 0)
    head = f"{attack.method} {attack.path} HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: close\r\n"
    head += f"Content-Type: {attack.content_type}\r\n" if attack.content_type else ""
    answer = bytearray()
    # A server may answer and close before it has read the request: what it said is lost to who reads it afterwards.
    reading = asyncio.create_task(_read(reader, answer))
    try:
        with suppress(ConnectionError):
            writer.write(f"{head}Content-Length: {length}\r\n\r\n".encode())
            for piece in attack.pieces:
                writer.write(piece)
                await writer.drain()
                if len(attack.pieces) > 1:
                    await asyncio.sleep(PAUSE_S)
        if not attack.cut:
            await reading
    finally:
        reading.cancel()
        writer.close()
    return bytes(answer)


async def _read(reader: asyncio.StreamReader, answer: bytearray) -> None:
    """Adds all that comes to ``answer``."""
    with suppress(ConnectionError):
        while got := await reader.read(2**16):
            answer += got


@contextmanager
def logged_errors() -> Iterator[list[str]]:
    """The messages that a server in this process logs as its own errors, also when no client is left to get them."""
    errors: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(handler.format(record))
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", "ray.serve")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield errors
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
