"""Who is let in, how often, with how much and for how long, as a client sees it; and how an error ends an answer."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from served import JSON_TYPE, health, local_api

from deployments.config import ConfigError, parse_config
from deployments.http.api import make_api
from deployments.http.errors import LONGEST_RETRY_S, error_response
from deployments.http.rate_limits import Charge, Client, TokenBucket
from deployments.schemas.events import Events, Started
from deployments.serve.edge import Edge
from rapid.errors import ContextLengthExceeded, Overloaded, RapidError
from rapid.events import Delta, Finish, Statistics

BODY = {"model": "letters", "prompt": "abc", "max_tokens": 2, "temperature": 0}
LONG = {**BODY, "max_tokens": 7000, "rapid": {"strategy": "autoregressive"}}
ERROR = {"message", "type", "param", "code"}

Serve = Callable[..., str]


@pytest.fixture
def serve(tiny_folder: Path) -> Iterator[Serve]:
    """Starts the API with the given access rules; returns its URL."""
    with ExitStack() as stack:

        def start(engine: dict[str, Any] | None = None, **access: Any) -> str:
            target = {"model": str(tiny_folder), "kv_memory_gib": 0.1, "threads": 1} | (engine or {})
            config = {"served_model": "letters", "target": target, "colocated": True, "access": access}
            return stack.enter_context(local_api(config))

        yield start


def complete(url: str, key: str | None = None, **more: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{url}/v1/completions", json={**BODY, **more}, headers=headers, timeout=60)


def code(answer: httpx.Response) -> str:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == ERROR
    return str(error["code"])


def test_only_known_keys_are_let_in(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("RAPID_API_KEYS", "from-the-environment, and-another")
    url = serve(api_keys=["from-the-file"])
    for key in ("from-the-file", "from-the-environment", "and-another"):
        assert complete(url, key).status_code == 200
    for key in (None, "from-the-fil", "from-the-file-", ","):
        refused = complete(url, key)
        assert (refused.status_code, code(refused)) == (401, "invalid_api_key")
        assert refused.headers["WWW-Authenticate"] == "Bearer"
    wrong_scheme = httpx.get(f"{url}/v1/models", headers={"Authorization": "Basic from-the-file"})
    assert wrong_scheme.status_code == 401 and httpx.get(f"{url}/docs").status_code == 401
    assert httpx.get(f"{url}/health").status_code == 200
    assert "from-the" not in caplog.text


def test_a_key_is_never_shown() -> None:
    config = parse_config({"access": {"api_keys": ["hunter2"]}})
    assert "hunter2" not in f"{config!r} {config} {config.model_dump()} {config.model_dump_json()}"
    with pytest.raises(ConfigError, match=r"api_keys: .*empty") as caught:
        parse_config({"access": {"api_keys": ["hunter2", " "]}})
    assert "hunter2" not in str(caught.value)


def test_a_keys_requests_are_limited_and_no_other_keys(serve: Serve) -> None:
    url = serve(api_keys=["a", "b"], requests_per_minute=2)
    assert [complete(url, "a").status_code for _ in range(2)] == [200, 200]
    refused = complete(url, "a")
    assert (refused.status_code, code(refused)) == (429, "rate_limit_exceeded")
    assert 1 <= int(refused.headers["Retry-After"]) <= 30
    assert complete(url, "b").status_code == 200 == httpx.get(f"{url}/health").status_code


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_settled_after_the_fact_without_keys_too(serve: Serve, stream: bool) -> None:
    url = serve(tokens_per_minute=60)
    assert complete(url, prompt="a" * 80, max_tokens=40, stream=stream).status_code == 200
    refused = complete(url)
    assert (refused.status_code, code(refused)) == (429, "rate_limit_exceeded")
    assert 30 <= int(refused.headers["Retry-After"]) <= 62  # 120 tokens, of which 60 were there


def spent(events: list[Any], num_read: int) -> float:
    """What of 1,000 tokens a client has spent that read so many of ``events`` and left."""

    async def written() -> Events:
        for event in events:
            if isinstance(event, Exception):
                raise event
            yield event

    async def read(client: Client) -> None:
        with suppress(RapidError):
            async with aclosing(Charge(client).counted(written(), 100)) as counted:
                for _ in range(num_read):
                    await anext(counted)

    client = Client(tokens=(tokens := TokenBucket(1000)))
    asyncio.run(read(client))
    return 1000 - tokens._left


def test_a_prompt_is_paid_for_once_and_also_by_who_leaves_early() -> None:
    delta = Delta([1, 2], ["a", "b"], 0, 0, "none", 0, 0, 0, [])
    finish = Finish("", "length", Statistics("rapid", prompt_tokens=80, emitted=4))
    whole = [Started(80), delta, delta._replace(choice=1), delta, finish, finish._replace(choice=1)]
    assert [spent(whole, number) for number in (1, 2, 3, 6)] == [80, 82, 84, 86]
    assert spent([Started(80), Overloaded("no place")], 2) == 0
    too_long = ContextLengthExceeded(prompt_tokens=80, max_tokens=9, window=70)
    assert spent([Started(80), too_long], 2) == 80


class Slow:
    """A service whose answers end when the test says so; it counts what runs."""

    files = None

    def __init__(self) -> None:
        self.num_running = self.num_most = 0
        self.goes_on = asyncio.Event()

    async def generate(self, completion: Any, tenant: str) -> Events:
        yield Started(8000)
        self.num_running += 1
        self.num_most = max(self.num_most, self.num_running)
        await self.goes_on.wait()
        self.num_running -= 1
        yield Delta([1] * 10, ["x"] * 10, 0, 0, "none", 1.0, 0.0, 1.0, [])
        yield Finish("", "length", Statistics("rapid", prompt_tokens=8000))


async def ask_at_once(access: dict[str, Any], keys: list[str], **target: Any) -> tuple[Slow, list[httpx.Response]]:
    """One request for each of ``keys``, all sent before any is answered."""
    service = Slow()
    app = make_api(parse_config({"access": access, "target": target}), service)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:

        def ask(key: str) -> Any:
            body = {"model": "smollm2-135m-instruct", "prompt": "x", "max_tokens": 10}
            return client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})

        asked = [asyncio.create_task(ask(key)) for key in keys]
        for _ in range(50):
            await asyncio.sleep(0)
        service.goes_on.set()
        return service, await asyncio.gather(*asked)


def test_requests_at_once_do_not_overdraw_what_one_after_another_may_have() -> None:
    """The prompt and all that may be written are reserved before the target reads; 8,010 of 10,000 leave 1,990."""
    access = {"api_keys": ["a", "b"], "tokens_per_minute": 10_000, "max_in_flight": 100}
    _, answers = asyncio.run(ask_at_once(access, ["a"] * 20 + ["b"]))
    assert sorted(answer.status_code for answer in answers[:-1]) == [200] + [429] * 19
    assert answers[-1].status_code == 200
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert 30 <= int(refused.headers["Retry-After"]) <= 61


def test_one_key_never_has_all_places() -> None:
    """With two keys and four places, three; what waits is answered in its turn, and too many that wait are refused."""
    service, answers = asyncio.run(
        ask_at_once({"api_keys": ["a", "b"]}, ["a"] * 9 + ["b"], max_sequences=4, max_queued=5)
    )
    assert service.num_most == 3 + 1
    assert sorted(answer.status_code for answer in answers) == [200] * 9 + [429]
    service, answers = asyncio.run(ask_at_once({"api_keys": ["a"]}, ["a"] * 9, max_sequences=4))
    assert service.num_most == 9


def test_what_is_refused_has_its_price(serve: Serve) -> None:
    """A token for four bytes, announced or not, whatever was wrong with them; wrong keys have a limit of their own."""
    url = serve(tokens_per_minute=1000, wrong_keys_per_minute=3, api_keys=["a", "b"])
    assert complete(url, "a", prompt="a" * 3000, wrong=1).status_code == 400
    assert complete(url, "a", prompt="a" * 3000, wrong=1).status_code == 429
    body, headers = (
        json.dumps({"prompt": "a" * 3000}).encode(),
        {"Authorization": "Bearer b", "Content-Type": "application/json"},
    )
    in_pieces = (httpx.post(f"{url}/tokenize", content=iter([body]), headers=headers) for _ in range(2))
    assert [answer.status_code for answer in in_pieces] == [200, 429]
    assert [complete(url, "no").status_code for _ in range(4)] == [401, 401, 401, 429]
    assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer a"}).status_code == 200


@pytest.mark.parametrize(
    ("access", "host", "status"),
    [
        ({}, "evil.example", 403),
        ({}, "evil.example:8000", 403),
        ({}, "127.0.0.1.evil.example", 403),
        ({}, "[", 403),
        ({}, "localhost:8000", 200),
        ({}, "127.0.0.1:8000", 200),
        ({}, "[::1]:8000", 200),
        ({"allowed_hosts": ["rapid.example"]}, "Rapid.Example", 200),
        ({"allowed_hosts": ["rapid.example"]}, "localhost", 403),
        ({"allowed_hosts": ["*"]}, "evil.example", 200),
        ({"api_keys": ["a"]}, "evil.example", 200),
    ],
)
def test_a_page_that_gives_its_name_our_address_reads_nothing(access: dict[str, Any], host: str, status: int) -> None:
    class Idle:
        files = None

        async def window(self) -> int:
            return 1

    async def ask() -> httpx.Response:
        app = make_api(parse_config({"access": access}), Idle())  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.get("/v1/models", headers={"Host": host, "Authorization": "Bearer a"})

    answer = asyncio.run(ask())
    assert answer.status_code == status
    assert status == 200 or code(answer) == "host_not_allowed"


@pytest.mark.parametrize(
    "name", ["X-Request-Disconnect-Disabled", "serve-multiplexed-model-id", "Serve_Multiplexed_Model_Id"]
)
def test_headers_of_serves_own_are_refused(letters_url: str, name: str) -> None:
    refused = httpx.post(f"{letters_url}/v1/completions", json=BODY, headers={name: "?1"})
    assert (refused.status_code, code(refused)) == (400, "header_not_allowed")


def test_the_edge_takes_them_away_and_names_that_are_too_long() -> None:
    seen: dict[bytes, bytes] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope["headers"])

    sent = {
        b"x-request-disconnect-disabled": b"?1",
        b"serve_multiplexed_model_id": b"m",
        b"x-request-id": b"n" * 129,
        b"accept": b"*/*",
        b"server": b"s",
    }
    asyncio.run(Edge(app)({"type": "http", "headers": list(sent.items())}, None, None))  # type: ignore[arg-type]
    assert seen == {b"accept": b"*/*", b"server": b"s"}
    asyncio.run(Edge(app)({"type": "http", "headers": [(b"x-request-id", b"n" * 128)]}, None, None))  # type: ignore[arg-type]
    assert seen[b"x-request-id"] == b"n" * 128


@pytest.mark.parametrize("trickles", [False, True])
def test_a_body_that_does_not_come_counts_as_a_client_that_left(
    trickles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, other = ("_BODY_S", "_SILENT_S") if trickles else ("_SILENT_S", "_BODY_S")  # each limit ends it alone
    monkeypatch.setattr(f"deployments.serve.edge.{ended}", 0.1)
    monkeypatch.setattr(f"deployments.serve.edge.{other}", 1e6)

    async def story() -> None:
        received: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            while not received or received[-1] == "http.request":
                received.append((await receive())["type"])

        async def receive() -> dict[str, Any]:
            if received and not trickles:
                await asyncio.Event().wait()
            await asyncio.sleep(0.001)
            return {"type": "http.request", "body": b"{", "more_body": True}

        edge = Edge(app)({"type": "http", "headers": []}, receive, None)  # type: ignore[arg-type]
        await asyncio.wait_for(edge, 10)
        assert received[0] == "http.request" and received[-1] == "http.disconnect"

    asyncio.run(story())


def test_behind_its_body_a_client_may_wait_as_long_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer may take longer than a body."""
    monkeypatch.setattr("deployments.serve.edge._SILENT_S", 0.01)

    async def story() -> None:
        left, waits = asyncio.Event(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            assert await receive() == whole
            waits.set()
            assert await receive() == {"type": "http.disconnect"} and left.is_set()

        async def receive() -> dict[str, Any]:
            if waits.is_set():
                await left.wait()
                return {"type": "http.disconnect"}
            return whole

        whole = {"type": "http.request", "body": b"{}"}
        edge = asyncio.create_task(Edge(app)({"type": "http", "headers": []}, receive, None))  # type: ignore[arg-type]
        await waits.wait()
        await asyncio.sleep(0.03)
        assert not edge.done()
        left.set()
        await asyncio.wait_for(edge, 30)

    asyncio.run(story())


def test_a_configuration_names_where_keys_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("of-a-file\n\n of-its-third-line \n")
    monkeypatch.setenv("OUR_KEYS", "of-a-variable, another")
    config = parse_config({"access": {"api_keys": [f"file:{tmp_path / 'keys'}", "env:OUR_KEYS"]}})
    assert config.access.keys == ["of-a-file", "of-its-third-line", "of-a-variable", "another"]
    for named, why in (("file:/nowhere", "cannot be read"), ("env:NOT_SET", "has no key")):
        with pytest.raises(ConfigError, match=why):
            _ = parse_config({"access": {"api_keys": [named]}}).access.keys


@pytest.mark.parametrize("path", ["completions", "files"])
def test_a_body_too_large_is_refused_however_it_comes(serve: Serve, path: str) -> None:
    url = serve(**{"max_body_mb" if path == "files" else "max_json_mb": 0.01})  # each kind has a limit of its own
    kind = "multipart/form-data; boundary=x" if path == "files" else "application/json"
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' if path == "files" else b""
    whole = head + b"x" * 20_000

    def in_pieces() -> Iterator[bytes]:
        yield from (whole[i : i + 1000] for i in range(0, len(whole), 1000))

    for content in (whole, in_pieces()):
        refused = httpx.post(f"{url}/v1/{path}", content=content, headers={"Content-Type": kind})
        assert (refused.status_code, code(refused)) == (413, "request_too_large")
    assert complete(url).status_code == 200


def test_an_answer_that_takes_too_long_ends(serve: Serve) -> None:
    url = serve(request_timeout_s=2)
    late = complete(url, **LONG)
    assert (late.status_code, code(late)) == (504, "request_timeout")
    with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}) as begun:
        assert begun.status_code == 200
        events = "".join(begun.iter_text()).split("\n\n")
    *written, error, done, rest = events
    assert len(written) > 1 and (done, rest) == ("data: [DONE]", "")
    kind, _, data = error.partition("\n")
    assert kind == "event: error" and json.loads(data.removeprefix("data: "))["error"]["code"] == "request_timeout"
    deadline = time.monotonic() + 10
    while health(url)["sequences"]["target"]:
        assert time.monotonic() < deadline


def test_a_body_that_does_not_come_is_not_waited_for(serve: Serve) -> None:
    url = httpx.URL(serve(request_timeout_s=0.3))
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{JSON_TYPE}Content-Length: 9\r\n\r\n{{".encode()
        )
        answer = connection.makefile("rb").readline()
    assert b" 408 " in answer


def test_a_queue_that_is_full_says_when_to_come_back(serve: Serve) -> None:
    room_for_one = 7_100 * 128  # bytes of a token in float32
    url = serve({"kv_memory_gib": room_for_one / 2**30, "max_queued": 1, "dtype": "float32"})
    with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}, timeout=60) as running:
        texts = running.iter_text()  # the response lives as long as this
        next(texts)
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(complete, url, **LONG | {"max_tokens": 200}) for _ in range(3)]
            while sum(answer.done() for answer in asked) < 2:
                time.sleep(0.01)
            running.close()
            answers = sorted((answer.result() for answer in asked), key=lambda answer: answer.status_code)
    assert [answer.status_code for answer in answers] == [200, 429, 429]
    assert {code(answer) for answer in answers[1:]} == {"overloaded"}
    assert all(1 <= int(answer.headers["Retry-After"]) <= LONGEST_RETRY_S for answer in answers[1:])


def test_clients_that_were_refused_together_do_not_come_back_together() -> None:
    """64 draws of five numbers are all the same once in 10^44."""
    answers = [error_response(Overloaded("full", status=status), "/v1/completions") for status in (429, 503) * 32]
    assert {int(answer.headers["Retry-After"]) for answer in answers} <= set(range(1, LONGEST_RETRY_S + 1))
    assert len({answer.headers["Retry-After"] for answer in answers}) > 1


def test_pages_of_other_origins_may_ask_only_where_they_are_named(serve: Serve) -> None:
    asking = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    closed, opened = serve(api_keys=["a"]), serve(api_keys=["a"], cors_origins=["https://chat.example"])
    allowed = "Access-Control-Allow-Origin"
    assert allowed not in httpx.options(f"{closed}/v1/completions", headers=asking).headers
    preflight = httpx.options(f"{opened}/v1/completions", headers=asking)
    assert (preflight.status_code, preflight.headers[allowed]) == (200, "https://chat.example")
    for key, status in ((None, 401), ("a", 200)):
        origin = {"Origin": "https://chat.example"} | ({"Authorization": f"Bearer {key}"} if key else {})
        answer = httpx.get(f"{opened}/v1/models", headers=origin)
        assert (answer.status_code, answer.headers[allowed]) == (status, "https://chat.example")
    other = httpx.options(f"{opened}/v1/completions", headers={**asking, "Origin": "https://other.example"})
    assert allowed not in other.headers


def test_a_page_of_another_origin_cannot_upload(serve: Serve) -> None:
    """A form is sent without asking first, so CORS alone would only keep the answer from the page."""
    url = serve(cors_origins=["https://chat.example"])

    def upload(**headers: str) -> int:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(f"{url}/v1/files", files={"file": ("a.txt", b"abc")}, headers=names, timeout=60).status_code

    assert upload(Origin="https://other.example") == upload(Origin="null", Sec_Fetch_Site="cross-site") == 403
    warm = httpx.post(f"{url}/v1/files/file-1/warm", headers={"Origin": "https://other.example"})
    assert (warm.status_code, code(warm)) == (403, "origin_not_allowed")
    assert upload() == upload(Origin="https://chat.example") == upload(Origin=url) == 200
    assert upload(Origin="https://renamed.example", Sec_Fetch_Site="same-origin") == 200


def test_what_is_left_of_the_limits_is_told(serve: Serve) -> None:
    url = serve(requests_per_minute=2, tokens_per_minute=60, cors_origins=["*"])
    answers = [complete(url), complete(url), complete(url)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    told = [{n.removeprefix("x-ratelimit-"): v for n, v in a.headers.items() if "ratelimit" in n} for a in answers]
    assert [(t["limit-requests"], t["remaining-requests"], t["limit-tokens"]) for t in told] == [
        ("2", "1", "60"), ("2", "0", "60"), ("2", "0", "60")
    ]  # fmt: skip
    assert 50 <= int(told[1]["remaining-tokens"]) <= 57  # one comes back each second
    assert 29 <= float(told[0]["reset-requests"].removesuffix("s")) <= 30
    exposed = httpx.get(f"{url}/health", headers={"Origin": "https://any.example"})
    names = exposed.headers["Access-Control-Expose-Headers"].lower().split(", ")
    assert {"x-request-id", "x-ratelimit-reset-tokens"} <= set(
        names
    ) and "x-ratelimit-limit-tokens" not in exposed.headers
    bucket = TokenBucket(60)
    bucket.take(90)
    assert bucket.headers("tokens")["x-ratelimit-reset-tokens"] == "1m30s"


class Unwell:
    """A service that fails in a way nobody expected."""

    files = None

    async def health(self) -> None:
        raise ZeroDivisionError


def test_below_a_prefix_the_same_is_open_and_every_answer_has_a_name() -> None:
    app = FastAPI()
    app.mount("/llm", make_api(parse_config({"access": {"api_keys": ["a"]}}), Unwell()))  # type: ignore[arg-type]

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            paths = ("/", "/version", "/health", "/v1/models", "/metrics", "/v1/health")
            asked = [await client.get(f"/llm{path}") for path in paths]
            return [*asked, await client.get("/llm/nowhere", headers={"Authorization": "Bearer a"})]

    answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [200, 200, 500, 401, 401, 401, 404]
    assert all(answer.headers["X-Request-Id"] for answer in answers)
    assert code(answers[2]) == "internal_error"
