"""The guard of the API. It checks key, origin, rate, size and time before a request reaches a route.

A key is never kept as it is, shown or logged: the guard knows its SHA-256, whose beginning is the `tenant` that files
belong to.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from dataclasses import dataclass, field

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.config import AccessConfig
from deployments.http.errors import error_response, is_json, server_sent_error
from deployments.http.rate_limits import HEADERS, PUBLIC, Client, Clients, RateLimited
from rapid.errors import InvalidRequest, RapidError

_OPEN = {"/", "/favicon.ico", "/health", "/version"}  # without a key, for probes and browsers


class InvalidKey(RapidError):
    """The key is missing or unknown."""

    _code = "invalid_api_key"
    _status = 401


class OriginRefused(RapidError):
    """A page of another origin sends a request for which its browser does not ask permission first."""

    _code = "origin_not_allowed"
    _status = 403


class TimedOut(RapidError):
    """The request took longer than its limit."""

    _code = "request_timeout"
    _status = 504


def guard(app: FastAPI, config: AccessConfig) -> None:
    """Guards ``app`` as ``config`` says; it names the origins whose pages may send requests."""
    app.add_middleware(_Guard, config=config)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id", *HEADERS],
        )


class _Guard:
    def __init__(self, app: ASGIApp, config: AccessConfig) -> None:
        self._app, self._config = app, config
        self._keys = [hashlib.sha256(key.encode()).digest() for key in config.keys]
        self._clients = Clients(config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        is_form = headers.get("content-type", "").startswith("multipart/form-data")
        most_mb = self._config.max_body_mb if is_form else self._config.max_json_mb
        exchange = _Exchange(scope, receive, send, int(most_mb * 1e6))
        scope["rapid.client"] = Client()
        try:
            self._check_origin(scope["method"], headers)
            if (scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")) or "/") not in _OPEN:
                scope["rapid.client"] = self._client(scope)
                scope["rapid.client"].admit()
            exchange.check_length(headers)
            async with asyncio.timeout(self._config.request_timeout_s) as limit:
                await self._app(scope, exchange.receive, exchange.send)
        except TimeoutError:
            if not limit.expired():
                raise
            await exchange.end(self._timed_out(exchange.has_body))
        except InvalidKey as error:
            await exchange.end(error, {"WWW-Authenticate": "Bearer"})
        except RateLimited as error:
            await exchange.end(error, {"Retry-After": str(error.retry_after)})
        except RapidError as error:
            await exchange.end(error)

    def _check_origin(self, method: str, headers: Headers) -> None:
        """Raises OriginRefused. For all but a form or a bare POST the browser asks permission first, from CORS."""
        origin = headers.get("origin")
        if method != "POST" or is_json(headers) or origin is None:
            return
        # A proxy may change the host's name, but not what the browser says about the page.
        is_own = headers.get("sec-fetch-site") == "same-origin" or origin.partition("://")[2] == headers.get("host")
        if not is_own and not {"*", origin} & set(self._config.cors_origins):
            raise OriginRefused("pages of this origin may not ask here: access.cors_origins names those that may")

    def _client(self, scope: Scope) -> Client:
        """Raises InvalidKey."""
        if not self._keys:
            address = scope["client"][0] if scope.get("client") else ""
            return self._clients.get(address, PUBLIC)
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        # Always all keys: the time that this takes must not tell which key is nearly right.
        is_known = [hmac.compare_digest(digest, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(is_known):
            how = "send it as `Authorization: Bearer <key>`" if not key else "it is not one of this server's"
            raise InvalidKey(f"an API key is needed: {how}")
        tenant = digest.hex()[:32]
        return self._clients.get(tenant, tenant)

    def _timed_out(self, has_body: bool) -> TimedOut:
        limit = f"{self._config.request_timeout_s:g} s"
        if has_body:
            return TimedOut(f"the answer was not finished within {limit}")
        return TimedOut(f"the request's body did not come within {limit}", status=408)


@dataclass
class _Exchange:
    """The messages of one request: it counts the bytes that come and remembers whether the answer has begun."""

    _scope: Scope
    _receive: Receive
    _send: Send
    max_bytes: int
    num_bytes: int = 0
    has_body: bool = False
    started: Message | None = field(default=None)

    def check_length(self, headers: Headers) -> None:
        """Raises InvalidRequest where the announced body is too large."""
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self.max_bytes:
            raise self._too_large()

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self.num_bytes += len(message.get("body", b""))
            self.has_body = not message.get("more_body", False)
            if self.num_bytes > self.max_bytes:
                raise self._too_large()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = message
            for what, bucket in self._scope["rapid.client"].limits.items():
                MutableHeaders(scope=message).update(bucket.headers(what))
        await self._send(message)

    async def end(self, error: RapidError, headers: dict[str, str] | None = None) -> None:
        """Answers with ``error``. An event stream that has begun ends with it; another answer is cut off."""
        self._scope.setdefault("state", {})["error"] = error  # for the log
        if self.started is None:
            return await error_response(error, headers)(self._scope, self._receive, self.send)
        if not Headers(raw=self.started["headers"]).get("content-type", "").startswith("text/event-stream"):
            raise error
        end = f"{server_sent_error(error)}data: [DONE]\n\n"
        await self._send({"type": "http.response.body", "body": end.encode(), "more_body": False})

    def _too_large(self) -> InvalidRequest:
        return InvalidRequest(
            f"a body of this kind may have {self.max_bytes / 1e6:g} MB", code="request_too_large", status=413
        )
