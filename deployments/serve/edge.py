"""What is taken from a request before Ray Serve's proxy reads it: headers by which Serve's own parts talk to it.

Serve obeys them whoever sends them. One lets a request go on for a client that has left, one makes the router remember
a name for ever, one limits the time, and the request's name goes into every process's log, however long it is.

`rapid serve`, the image (so also the Kubernetes manifests) and `make serve` name this module to the proxy in
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH; where `serve run` is called by hand it has to be in Ray's environment.
Without it the Ingress refuses requests with such headers, and its router (`LeaseRouter`) forgets the names.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS

from deployments.http.internal_headers import is_internal
from deployments.http.request_log import ID_CHARACTERS, ID_HEADER


class Edge:
    """Passes a request on without headers that only Serve may set, or with a name that is too long for a log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            kept = [(name, value) for name, value in scope["headers"] if not _is_unwanted(name, value)]
            scope = {**scope, "headers": kept}
        await self._app(scope, receive, send)


def _is_unwanted(name: bytes, value: bytes) -> bool:
    called = name.decode("latin-1")
    if called.lower() == ID_HEADER.lower():
        return len(value) > ID_CHARACTERS or not value.decode("latin-1").isprintable()
    return is_internal(called)


def middlewares() -> list[Middleware]:
    """What Serve's proxy calls when it starts, before it listens."""
    # Where a client offers HTTP/2 (the JDK's, `curl --http2`), httptools, uvicorn's first choice, drops the body.
    HTTP_PROTOCOLS["auto"] = HTTP_PROTOCOLS["h11"]
    return [Middleware(Edge)]
