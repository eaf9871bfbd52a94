"""Rate limits: the requests and tokens that one client may have in a minute."""

from __future__ import annotations

import math
import random
import time
from collections import OrderedDict
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import Request

from deployments.config import PUBLIC
from deployments.schemas.events import Events, Started
from rapid.errors import RapidError
from rapid.events import Delta

HEADERS = [
    f"x-ratelimit-{value}-{what}" for what in ("requests", "tokens") for value in ("limit", "remaining", "reset")
]
ASKED_FOR = "rapid.asked_for"  # in the scope of a batch's request: the `files.batch_records.Record` that it belongs to
LATE_REFUSAL_S = 2.0  # at least; far longer than it takes to refuse
_MAX_CLIENTS = 10_000  # whose rates are remembered


class RateLimited(RapidError):
    """A client has used its requests or tokens of a minute; ``retry_after`` seconds later there are more."""

    _code = "rate_limit_exceeded"
    _status = 429

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TokenBucket:
    """A minute's allowance, refilled steadily. It may be overdrawn, since the cost of a request is known afterwards."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute, self._left, self._at = per_minute, float(per_minute), time.monotonic()

    def seconds_until(self, amount: int) -> float:
        """How long until the bucket holds ``amount``."""
        now = time.monotonic()
        self._left = min(self.per_minute, self._left + (now - self._at) * self.per_minute / 60)
        self._at = now
        return max(0.0, (amount - self._left) * 60 / self.per_minute)

    def take(self, amount: int) -> None:
        self._left -= amount

    def headers(self, what: str) -> dict[str, str]:
        """OpenAI's headers: the allowance, the rest of it, and when the bucket is full again."""
        minutes, seconds = divmod(self.seconds_until(self.per_minute), 60)
        reset = f"{minutes:.0f}m{seconds:.0f}s" if minutes else f"{seconds:.3f}s"
        values = {"limit": str(self.per_minute), "remaining": str(max(0, math.floor(self._left))), "reset": reset}
        return {f"x-ratelimit-{name}-{what}": value for name, value in values.items()}


@dataclass
class Client:
    """Where a request comes from. It sees the files of ``tenant`` and waits its turn under ``name``.

    A limit that is None does not hold. Of ``refusals`` more than a minute's come late.
    """

    tenant: str = PUBLIC
    name: str = PUBLIC
    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None
    refusals: TokenBucket | None = None

    @property
    def limits(self) -> dict[str, TokenBucket]:
        named = {"requests": self.requests, "tokens": self.tokens}
        return {what: bucket for what, bucket in named.items() if bucket is not None}

    def admit(self) -> None:
        """Counts a request.

        Raises:
            RateLimited: the client has used its requests or its tokens.
        """
        for what, bucket in self.limits.items():
            if (wait := bucket.seconds_until(1)) > 0:
                retry_after = math.ceil(wait)
                raise RateLimited(f"more than {bucket.per_minute} {what} a minute: wait {retry_after} s", retry_after)
        if self.requests is not None:
            self.requests.take(1)

    def refusal_waits_s(self) -> float:
        """Counts a request that is refused, and says how long its answer waits: who sends many must wait for each."""
        if self.refusals is None:
            return 0.0
        is_late = self.refusals.seconds_until(1) > 0
        if not is_late:
            self.refusals.take(1)
        # Requests that were refused together must not be followed by others together.
        return LATE_REFUSAL_S * random.uniform(1, 2) if is_late else 0.0

    def spend(self, num_tokens: int) -> None:
        if self.tokens is not None:
            self.tokens.take(num_tokens)


@dataclass
class Charge:
    """What one request costs its client: reserved before that is known, and settled when it is."""

    client: Client
    num_tokens: int = 0

    def reserve(self, num_tokens: int) -> None:
        """Sets the cost, as long as the client has so many tokens; one full minute is enough for any request.

        Raises:
            RateLimited: what other requests have spent or reserved leaves too little.
        """
        bucket = self.client.tokens
        if bucket is not None:
            bucket.take(-self.num_tokens)
            wait = bucket.seconds_until(min(num_tokens, bucket.per_minute))
            bucket.take(self.num_tokens)
            if wait > 0:
                retry_after = math.ceil(wait)
                message = f"more than {bucket.per_minute} tokens a minute, with {num_tokens} for this request"
                raise RateLimited(f"{message}: wait {retry_after} s", retry_after)
        self.settle(num_tokens)

    def settle(self, num_tokens: int) -> None:
        self.client.spend(num_tokens - self.num_tokens)
        self.num_tokens = num_tokens

    async def counted(self, events: Events, most_new_tokens: int) -> Events:
        """``events``, for which the prompts and ``most_new_tokens`` are reserved when a prompt is known.

        In the end the prompts and what was written count. A request that the service had no place for costs nothing;
        one that was refused for what it is costs what had been read of it.

        Raises:
            RateLimited: as `reserve`.
        """
        prompt_tokens: int | None = None
        num_written = 0
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Started):
                        prompt_tokens = (prompt_tokens or 0) + event.prompt_tokens
                        self.reserve(prompt_tokens + most_new_tokens)
                    elif isinstance(event, Delta):
                        num_written += len(event.tokens)
                    yield event
        except RapidError as error:
            if error.status in (429, 503) and not num_written:
                prompt_tokens = 0
            raise
        finally:
            if prompt_tokens is not None:
                self.settle(prompt_tokens + num_written)


class Clients:
    """The clients whose rates are remembered, by name; the least recently seen is forgotten first."""

    def __init__(
        self,
        requests_per_minute: int | None,
        tokens_per_minute: int | None = None,
        refusals_per_minute: int | None = None,
    ) -> None:
        self._limits = requests_per_minute, tokens_per_minute, refusals_per_minute
        self._clients: OrderedDict[str, Client] = OrderedDict()

    def get(self, name: str, tenant: str) -> Client:
        """The client called ``name``, with a full allowance where it is new."""
        if name not in self._clients:
            self._clients[name] = Client(tenant, name, *(TokenBucket(most) if most else None for most in self._limits))
        self._clients.move_to_end(name)
        if len(self._clients) > _MAX_CLIENTS:
            self._clients.popitem(last=False)
        return self._clients[name]


def client_of(request: Request) -> Client:
    """The client of ``request``, as `access.guard` found it."""
    return charge_of(request).client


def charge_of(request: Request) -> Charge:
    """What ``request`` costs its client so far."""
    charge: Charge = request.scope["rapid.charge"]
    return charge
