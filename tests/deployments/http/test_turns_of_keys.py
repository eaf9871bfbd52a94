"""What requests of one key take from those of another: places, threads that read, and the event loop."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import local_api
from starlette.requests import Request

from deployments import service, turns
from deployments.config import parse_config
from deployments.http import errors, rate_limits
from deployments.http.api import make_api
from deployments.schemas.events import Events, Started
from deployments.schemas.text import TextRequest
from deployments.schemas.tokenize import Tokenized, TokenizeRequest
from deployments.turns import FairPool
from rapid.events import Delta, Finish, Statistics
from retrieval.device import stands_behind

MODEL = "smollm2-135m-instruct"
ACCESS = {"api_keys": ["a", "b"]}  # with four places, three of a key


class Held:
    """A service whose answers end when the test says so; it counts the choices and texts under way."""

    files = None

    def __init__(self) -> None:
        self.num_running = self.num_most = 0
        self.goes_on = asyncio.Event()

    async def _hold(self, num: int) -> None:
        self.num_running += num
        self.num_most = max(self.num_most, self.num_running)
        await self.goes_on.wait()
        self.num_running -= num

    async def generate(self, completion: Any, tenant: str) -> Events:
        yield Started(8)
        await self._hold(completion.num_written)
        for choice in range(completion.num_written):
            yield Delta([1], ["x"], 0, 0, "none", 1.0, 0.0, 1.0, [], [], choice=choice)
            yield Finish("", "length", Statistics("rapid", prompt_tokens=8), choice=choice)

    async def tokenize(self, body: TokenizeRequest, tenant: str) -> Tokenized:
        await self._hold(1)
        return Tokenized(count=1, max_model_len=8, tokens=[1])


async def at_once(path: str, body: dict[str, Any], keys: str, **access: Any) -> tuple[int, list[int]]:
    """How much was under way at most, and the statuses, of one request for each key; all come before an answer."""
    held = Held()
    config = parse_config({"access": ACCESS | access, "target": {"max_sequences": 4}})
    transport = httpx.ASGITransport(make_api(config, held))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        asked = [
            asyncio.create_task(client.post(path, json=body, headers={"Authorization": f"Bearer {key}"}))
            for key in keys
        ]
        for _ in range(200):
            await asyncio.sleep(0)
        held.goes_on.set()
        return held.num_most, sorted([answer.status_code for answer in await asyncio.gather(*asked)])


def test_each_choice_takes_a_place() -> None:
    """Of three places two choices have two, and two more do not fit beside them."""
    two = {"model": MODEL, "prompt": "x", "max_tokens": 1, "n": 2}
    assert asyncio.run(at_once("/v1/completions", two, "aaaa")) == (2, [200] * 4)


def test_what_takes_no_place_is_bounded_for_each_key_too() -> None:
    assert asyncio.run(at_once("/tokenize", {"prompt": "x"}, "aaaaaaaab")) == (3 + 1, [200] * 9)


def test_what_may_be_written_is_reserved_too() -> None:
    """Of 10,000 tokens a minute two requests may not write 6,000 each at once."""
    body = {"model": MODEL, "prompt": "x", "max_tokens": 6000}
    assert asyncio.run(at_once("/v1/completions", body, "aab", tokens_per_minute=10_000)) == (2, [200, 200, 429])


def test_a_long_body_is_parsed_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    parse, threads = errors.parse, []

    def noted(kind: Any, body: bytes) -> Any:
        threads.append(threading.current_thread().name)
        return parse(kind, body)

    async def read(text: str) -> TokenizeRequest:
        body = json.dumps({"prompt": text}).encode()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        headers = [(b"content-type", b"application/json")]
        return await errors.read(TokenizeRequest, Request({"type": "http", "headers": headers}, receive))

    monkeypatch.setattr(errors, "parse", noted)
    assert asyncio.run(read("x" * 100_000)).prompt == "x" * 100_000
    [thread] = threads
    assert thread.startswith("parse")


@pytest.fixture(scope="module")
def url(tiny_folder: Path) -> Iterator[str]:
    target = {"model": str(tiny_folder), "kv_memory_gib": 0.1, "threads": 1}
    with local_api({"served_model": "letters", "target": target, "colocated": True, "access": ACCESS}) as url:
        yield url


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "letters", "prompt": "abc", "max_tokens": 1}),
        ("/tokenize", {"prompt": "abc"}),
        ("/detokenize", {"tokens": [1]}),
    ],
)
def test_each_key_has_turns_of_its_own_where_requests_are_read(
    url: str, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, readers = FairPool.run, []

    async def noted(self: FairPool, client: str, *call: Any, **options: Any) -> Any:
        readers.append(client)
        return await run(self, client, *call, **options)

    monkeypatch.setattr(FairPool, "run", noted)
    for key in "ab":
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.post(f"{url}{path}", json=body, headers=headers, timeout=60).status_code == 200
    assert len(readers) == len(set(readers)) == 2


def test_where_engines_are_in_the_same_process_nobody_stands_behind(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that stands behind keeps the interpreter while it is interrupted, and engines need it for every pass."""
    read, stood = TextRequest.read, []

    def noted(self: TextRequest, *how: Any) -> Any:
        stood.append(stands_behind())
        return read(self, *how)

    monkeypatch.setattr(TextRequest, "read", noted)
    monkeypatch.setattr(turns, "_MUCH_S", -1.0)
    body = {"model": "letters", "prompt": "abc", "max_tokens": 1}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers={"Authorization": "Bearer a"}, timeout=60)
    assert answer.status_code == 200
    assert stood == [False]


def test_a_request_with_many_choices_leaves_places_to_others(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six of the eight places of this engine; each choice has a sequence of its own."""
    written = service.generate_choices
    limits = []

    def noted(request: Any, num: int, backend: Any, *, at_once: int | None) -> Any:
        limits.append((num, at_once))
        return written(request, num, backend, at_once=at_once)

    monkeypatch.setattr(service, "generate_choices", noted)
    body = {"model": "letters", "prompt": "abc", "max_tokens": 1, "n": 8}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers={"Authorization": "Bearer a"}, timeout=60)
    assert len(answer.json()["choices"]) == 8
    assert limits == [(8, 6)]


async def answered(asked: asyncio.Task[httpx.Response], limit_s: float = 30.0) -> int:
    return (await asyncio.wait_for(asked, limit_s)).status_code


@pytest.mark.parametrize("keys", [("a", "b"), ("wrong", "a")])
def test_who_is_refused_often_waits_for_it_and_nobody_else_does(
    keys: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third refusal of a minute would come after an hour; until then each holds a turn of its key."""
    monkeypatch.setattr(rate_limits, "LATE_REFUSAL_S", 3600.0)
    hostile, honest = keys
    held = Held()
    held.goes_on.set()
    access = ACCESS | {"refusals_per_minute": 2}
    app = make_api(parse_config({"access": access, "target": {"max_sequences": 4}}), held)  # type: ignore[arg-type]

    async def main() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:

            def ask(key: str, **body: Any) -> asyncio.Task[httpx.Response]:
                headers = {"Authorization": f"Bearer {key}"}
                return asyncio.create_task(client.post("/tokenize", json=body, headers=headers))

            status = 401 if hostile == "wrong" else 400
            assert [await answered(ask(hostile, wrong=1)) for _ in range(2)] == [status, status]
            late = [ask(hostile, wrong=1) for _ in range(3)]
            assert [await answered(ask(honest, prompt="x")), await answered(ask(honest, wrong=1))] == [200, 400]
            if hostile != "wrong":
                late.append(ask(hostile, prompt="x"))  # behind three that have all of the key's turns
            assert await answered(ask(honest, prompt="x")) == 200
            assert not any(asked.done() for asked in late)
            for asked in late:
                asked.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    asyncio.run(main())


def test_late_refusals_do_not_come_together() -> None:
    client = rate_limits.Clients(None, None, 1).get("hostile", "hostile")
    assert client.refusal_waits_s() == 0
    waits = [client.refusal_waits_s() for _ in range(64)]
    assert all(rate_limits.LATE_REFUSAL_S <= wait <= 2 * rate_limits.LATE_REFUSAL_S for wait in waits)
    assert len(set(waits)) == len(waits)
