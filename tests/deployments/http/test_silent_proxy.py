"""Streams through a proxy that gives up after 15 s of silence, while the prompt is read for 30 s.

The seconds are those of a clock that leaps to the next timer whenever nothing is left to do, so none of them is waited
for. Server, proxy and client share its loop.
"""

from __future__ import annotations

import asyncio
import selectors
import socket
from collections.abc import Coroutine
from typing import Any

import httpx
import pytest
import uvicorn

from benchmarks.common.proxy import Proxy
from deployments.config import parse_config
from deployments.http import streaming
from deployments.http.api import make_api
from deployments.schemas.events import Events, Started
from rapid.events import Delta, Finish, Statistics

SILENCE_S, PREFILL_S = 15.0, 30.0
MODEL = "smollm2-135m-instruct"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "stream": True}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": MODEL, "prompt": "Hi", "stream": True},
    "/v1/responses": {"model": MODEL, "input": "Hi", "store": False, "stream": True},
    "/v1/messages": CHAT,
}
LAST = {"/v1/responses": "event: response.completed", "/v1/messages": "event: message_stop"}


class LeapingLoop(asyncio.SelectorEventLoop):
    """A loop whose time passes only while nothing is ready, and then at once."""

    def __init__(self) -> None:
        super().__init__(LeapingSelector())

    def time(self) -> float:
        leaping: LeapingSelector = self._selector  # type: ignore[attr-defined]
        return leaping.now


class LeapingSelector(selectors.DefaultSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # What was written to a socket a moment ago is on its way to the other end.
        ready = super().select(None if timeout is None else min(max(timeout, 0), 0.001))
        if not ready and timeout is not None:
            self.now += max(timeout, 0)
        return ready


def in_leaps(main: Coroutine[Any, Any, str]) -> str:
    with asyncio.Runner(loop_factory=LeapingLoop) as runner:
        return runner.run(main)


class Reading:
    """A service that reads the prompt for 30 s, and then writes a word."""

    files = None

    async def generate(self, completion: Any, tenant: str) -> Events:
        yield Started(7)
        await asyncio.sleep(PREFILL_S)
        yield Delta([1], ["word"], 0, 0, "none", 0.0, 0.0, 0.0, [])
        yield Finish("", "stop", Statistics("autoregressive", prompt_tokens=7, emitted=1))


async def streamed(proxy: Proxy, path: str) -> str:
    """The answer to a stream as the client behind ``proxy`` gets it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy.port = listener.getsockname()[1]
        app = make_api(parse_config({}), Reading())  # type: ignore[arg-type]
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        serving = asyncio.create_task(server.serve([listener]))
        try:
            async with proxy.listening() as port, httpx.AsyncClient(timeout=None) as client:
                answer = await client.post(f"http://127.0.0.1:{port}{path}", json=BODIES[path])
            return answer.text
        finally:
            server.should_exit = True
            await serving


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_is_complete_behind_a_proxy_that_gives_up(path: str) -> None:
    proxy = Proxy(0, SILENCE_S)
    text = in_leaps(streamed(proxy, path))
    assert "word" in text and LAST.get(path, "data: [DONE]") in text.strip().split("\n\n")[-1]
    assert proxy.given_up == 0 and proxy.longest_s < SILENCE_S / 2


def test_the_proxy_gives_up_on_a_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_BEAT_S", 2 * SILENCE_S)
    proxy = Proxy(0, SILENCE_S)
    with pytest.raises(httpx.RemoteProtocolError):
        in_leaps(streamed(proxy, "/v1/messages"))
    assert proxy.given_up == 1 and proxy.longest_s == pytest.approx(SILENCE_S)
