"""What happens to a request before Ray Serve's proxy reads it: headers by which Serve's own parts talk to it are taken
away, and a body that does not come ends it.

Serve obeys them whoever sends them. One lets a request go on for a client that has left, one makes the router remember
a name for ever, one limits the time, and the request's name goes into every process's log, however long it is.

`rapid serve`, the image (so also the Kubernetes manifests) and `make serve` name this module to the proxy in
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH; where `serve run` is called by hand it has to be in Ray's environment.
Without it the Ingress refuses requests with such headers, and its router (`LeaseRouter`) forgets the names.
"""

import asyncio

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS

from deployments.http.internal_headers import is_internal
from deployments.http.request_log import ID_CHARACTERS, ID_HEADER
from deployments.serve.worker import prepare_for_streams

_SILENT_S, _BODY_S = 20.0, 300.0  # between two pieces of a body, and for all of it


class Edge:
    """Passes a request on without headers that only Serve may set, or with a name that is too long for a log.

    A client whose body does not come counts as one that has left.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            kept = [(name, value) for name, value in scope["headers"] if not _is_unwanted(name, value)]
            scope = {**scope, "headers": kept}
        if scope["type"] == "http":
            receive = _within_time(receive)
        await self._app(scope, receive, send)


def _within_time(receive: Receive) -> Receive:
    """``receive``, which says that the client has left when its body is late. Behind the body it may wait for ever."""
    ends_at = asyncio.get_running_loop().time() + _BODY_S
    is_coming = True

    async def receive_in_time() -> Message:
        nonlocal is_coming
        if not is_coming:
            return await receive()
        try:
            async with asyncio.timeout_at(min(ends_at, asyncio.get_running_loop().time() + _SILENT_S)):
                message = await receive()
        except TimeoutError:
            return {"type": "http.disconnect"}
        is_coming = message.get("more_body", False)
        return message

    return receive_in_time


def _is_unwanted(name: bytes, value: bytes) -> bool:
    called = name.decode("latin-1")
    if called.lower() == ID_HEADER.lower():
        return len(value) > ID_CHARACTERS or not value.decode("latin-1").isprintable()
    return is_internal(called)


def middlewares() -> list[Middleware]:
    """What Serve's proxy calls when it starts, before it listens."""
    prepare_for_streams()
    # Where a client offers HTTP/2 (the JDK's, `curl --http2`), httptools, uvicorn's first choice, drops the body.
    HTTP_PROTOCOLS["auto"] = HTTP_PROTOCOLS["h11"]
    return [Middleware(Edge)]
