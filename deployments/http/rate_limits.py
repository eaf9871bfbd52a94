"""How much one client may ask in a minute."""

import math
import time
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import Request

from deployments.schemas.events import Events, Started
from rapid.errors import RapidError
from rapid.events import Delta

PUBLIC = "public"  # whose the files are where there are no keys


class RateLimited(RapidError):
    """One key's requests or tokens of a minute are used up for ``retry_after`` seconds."""

    _code = "rate_limit_exceeded"
    _status = 429

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TokenBucket:
    """A minute's allowance, refilled steadily. It may be overdrawn, since what a request costs is known afterwards."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute, self._left, self._at = per_minute, float(per_minute), time.monotonic()

    def seconds_until(self, amount: int) -> float:
        """How long until ``amount`` is there."""
        now = time.monotonic()
        self._left = min(self.per_minute, self._left + (now - self._at) * self.per_minute / 60)
        self._at = now
        return max(0.0, (amount - self._left) * 60 / self.per_minute)

    def take(self, amount: int) -> None:
        self._left -= amount

    def headers(self, what: str) -> dict[str, str]:
        """OpenAI's headers: what a minute has, what is left of it, and when all of it is there again."""
        minutes, seconds = divmod(self.seconds_until(self.per_minute), 60)
        reset = f"{minutes:.0f}m{seconds:.0f}s" if minutes else f"{seconds:.3f}s"
        told = {"limit": str(self.per_minute), "remaining": str(max(0, math.floor(self._left))), "reset": reset}
        return {f"x-ratelimit-{name}-{what}": value for name, value in told.items()}


@dataclass
class Client:
    """Who a request is from; ``tenant`` is whose files it sees. Its limits are None where there are none."""

    tenant: str = PUBLIC
    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None

    @property
    def limits(self) -> dict[str, TokenBucket]:
        named = {"requests": self.requests, "tokens": self.tokens}
        return {what: bucket for what, bucket in named.items() if bucket is not None}

    def admit(self) -> None:
        """Counts a request.

        Raises:
            RateLimited: there were too many, or too many tokens.
        """
        for what, bucket in self.limits.items():
            if (wait := bucket.seconds_until(1)) > 0:
                retry_after = math.ceil(wait)
                raise RateLimited(f"more than {bucket.per_minute} {what} a minute: wait {retry_after} s", retry_after)
        if self.requests is not None:
            self.requests.take(1)

    def spend(self, num_tokens: int) -> None:
        if self.tokens is not None:
            self.tokens.take(num_tokens)

    async def counted(self, events: Events) -> Events:
        """``events``, whose tokens count for this client: what is written at once, and with the first of it the prompt.

        Whoever leaves while the prompt is read has cost that, too; whoever is turned away has not.
        """
        prompt_tokens = 0
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Started):
                        prompt_tokens = event.prompt_tokens
                    elif isinstance(event, Delta):
                        self.spend(prompt_tokens + len(event.tokens))
                        prompt_tokens = 0
                    yield event
        except Exception:
            prompt_tokens = 0
            raise
        finally:
            self.spend(prompt_tokens)


def client_of(request: Request) -> Client:
    """Who ``request`` is from."""
    client: Client = request.scope["rapid.client"]
    return client
