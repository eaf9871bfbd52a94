"""The guard of the API. It checks key, origin, rate, size and time before a request reaches a route.

A key is never kept as it is, shown or logged: the guard knows its SHA-256, whose beginning is the `tenant` that files
belong to.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.config import PUBLIC, AppConfig
from deployments.files.batch_records import Record
from deployments.http.errors import error_response, is_json, server_sent_error
from deployments.http.internal_headers import check_headers
from deployments.http.multipart import is_form
from deployments.http.rate_limits import ASKED_FOR, HEADERS, Charge, Client, Clients
from deployments.turns import Turns
from rapid.errors import InvalidRequest, RapidError

_BYTES_A_TOKEN = 4  # of ordinary text
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


class HostRefused(RapidError):
    """The client knows this server by a name that is not this server's: a page may have given itself that name."""

    _code = "host_not_allowed"
    _status = 403


def guard(app: FastAPI, config: AppConfig) -> None:
    """Guards ``app`` as ``config.access`` says; it names the origins whose pages may send requests."""
    app.add_middleware(_Guard, config=config)
    if config.access.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.access.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id", *HEADERS],
        )


class _Guard:
    def __init__(self, app: ASGIApp, config: AppConfig) -> None:
        self._app, self._config = app, config.access
        self._keys = [hashlib.sha256(key.encode()).digest() for key in config.access.keys]
        self._hosts = {host.lower() for host in config.access.allowed_hosts} or ({"*"} if self._keys else {"localhost"})
        late = config.access.refusals_per_minute if len(self._keys) > 1 else None
        self._clients = Clients(config.access.requests_per_minute, config.access.tokens_per_minute, late)
        self._strangers = Clients(config.access.wrong_keys_per_minute, None, config.access.refusals_per_minute)
        self._turns = Turns(config.max_in_flight, config.target.max_queued)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        most_mb = self._config.max_body_mb if is_form(headers) else self._config.max_json_mb
        exchange = _Exchange(scope, receive, send, int(most_mb * 1e6))
        scope["rapid.charge"] = charge = Charge(Client())
        try:
            check_headers(headers)
            self._check_origin(scope["method"], headers)
            is_open = (scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")) or "/") in _OPEN
            if not is_open:
                self._check_host(headers)
                charge.client = self._client(scope)
                charge.client.admit()
            exchange.check_length(headers)
            async with asyncio.timeout(self._config.request_timeout_s) as limit:
                if is_open or scope["method"] != "POST":
                    return await self._app(scope, exchange.receive, exchange.send)
                async with self._turns.turn(charge.client.name):
                    await self._app(scope, exchange.receive, exchange.send)
        except TimeoutError:
            if not limit.expired():
                raise
            await exchange.end(self._timed_out(exchange.has_body))
        except InvalidKey as error:
            await exchange.end(error, {"WWW-Authenticate": "Bearer"})
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

    def _check_host(self, headers: Headers) -> None:
        """Raises HostRefused. A page can give its own name the address of this server, but cannot be named a number."""
        host = _host_of(headers.get("host", ""))
        if host and not {"*", host} & self._hosts and not _is_address(host):
            known = "access.allowed_hosts names what it is known as"
            raise HostRefused(f"this server is not known as {host[:64]}: {known}")

    def _client(self, scope: Scope) -> Client:
        """Raises InvalidKey, or RateLimited where too many keys of this address were wrong."""
        if batch := scope.get(ASKED_FOR):
            return self._client_of_batch(batch)
        address = scope["client"][0] if scope.get("client") else ""
        if not self._keys:
            return self._clients.get(address, PUBLIC)
        headers = Headers(scope=scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if not key:  # Anthropic's clients
            scheme, key = "bearer", headers.get("x-api-key", "")
        digest = hashlib.sha256(key.strip().encode()).digest()
        # Always all keys: the time that this takes must not tell which key is nearly right.
        is_known = [hmac.compare_digest(digest, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(is_known):
            scope["rapid.stranger"] = stranger = self._strangers.get(address, PUBLIC)
            stranger.admit()
            how = (
                "send it as `Authorization: Bearer <key>`, or as `x-api-key`"
                if not key
                else "it is not one of this server's"
            )
            raise InvalidKey(f"an API key is needed: {how}")
        tenant = digest.hex()[:32]
        return self._clients.get(tenant, tenant)

    def _client_of_batch(self, batch: Record) -> Client:
        """Raises InvalidKey where the key that made the batch is valid no more."""
        valid = [key.hex()[:32] for key in self._keys] or [PUBLIC]
        if batch.tenant not in valid:
            raise InvalidKey("the key that made this batch is not valid any more")
        return self._clients.get(batch.client, batch.tenant)

    def _timed_out(self, has_body: bool) -> TimedOut:
        limit = f"{self._config.request_timeout_s:g} s"
        if has_body:
            return TimedOut(f"the answer was not finished within {limit}")
        return TimedOut(f"the request's body did not come within {limit}", status=408)


def _host_of(header: str) -> str:
    """The name in a Host header, without the port."""
    with suppress(ValueError):
        return urlsplit(f"//{header}").hostname or ""
    return header


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


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
        if announced.isdecimal():
            self._scope["rapid.charge"].reserve(self._cost(int(announced)))

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self.num_bytes += len(message.get("body", b""))
            self.has_body = not message.get("more_body", False)
            if self.num_bytes > self.max_bytes:
                raise self._too_large()
            charge: Charge = self._scope["rapid.charge"]
            if (cost := self._cost(self.num_bytes)) > charge.num_tokens:  # it was not announced
                charge.reserve(cost)
        return message

    def _cost(self, num_bytes: int) -> int:
        """The tokens that a body counts as until it is known what it is, and where it is refused: those of its text.

        Nothing costs more than a minute's tokens: a file has more bytes than text.
        """
        bucket = self._scope["rapid.charge"].client.tokens
        return min(num_bytes // _BYTES_A_TOKEN, bucket.per_minute if bucket else num_bytes)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if 400 <= message["status"] < 500:
                refused: Client = self._scope.get("rapid.stranger", self._scope["rapid.charge"].client)
                await asyncio.sleep(refused.refusal_waits_s())
            self.started = message
            for what, bucket in self._scope["rapid.charge"].client.limits.items():
                MutableHeaders(scope=message).update(bucket.headers(what))
        await self._send(message)

    async def end(self, error: RapidError, headers: dict[str, str] | None = None) -> None:
        """Answers with ``error``. An event stream that has begun ends with it; another answer is cut off."""
        self._scope.setdefault("state", {})["error"] = error  # for the log
        if self.started is None:
            return await error_response(error, self._scope["path"], headers)(self._scope, self._receive, self.send)
        if not Headers(raw=self.started["headers"]).get("content-type", "").startswith("text/event-stream"):
            raise error
        end = f"{server_sent_error(error)}data: [DONE]\n\n"
        await self._send({"type": "http.response.body", "body": end.encode(), "more_body": False})

    def _too_large(self) -> InvalidRequest:
        return InvalidRequest(
            f"a body of this kind may have {self.max_bytes / 1e6:g} MB", code="request_too_large", status=413
        )
