"""Observes each HTTP request: metrics while it runs, and one line in the log at its end.

The line's fields are attributes of the log record, so Ray Serve writes them as JSON where its `logging_config` says so.
They hold no text of a prompt or an answer, unless `observability.log_prompts` asks for it.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections import defaultdict
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.config import AppConfig
from deployments.http.errors import as_rapid_error, error_response
from deployments.observability.metrics import RequestMetrics
from deployments.schemas.completions import Completion
from deployments.schemas.events import Events, PromptScored, Started, rapid_object
from rapid.events import Finish, Statistics

logger = logging.getLogger("ray.serve")

CLIENT_LEFT = 499  # nginx's status, which dashboards know; HTTP has none for this
ID_HEADER, ID_CHARACTERS = "X-Request-Id", 128


class _Observed:
    """One request so far. ``fields`` go into its line of the log."""

    def __init__(self, request_id: str) -> None:
        self.started = time.perf_counter()
        self.fields: dict[str, Any] = {"request_id": request_id}
        self.status: int | None = None
        self.error: Exception | None = None  # also one that came after the status was sent
        self.is_complete = False

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


@dataclass
class _Written:
    """The tokens of one choice so far, and when they came."""

    num_first: int = 0
    num_tokens: int = 0
    first_at: float = 0.0
    last_at: float = 0.0

    def push(self, num_tokens: int) -> bool:
        """Counts a round's tokens. Returns whether they are the first."""
        self.last_at = time.perf_counter()
        self.num_tokens += num_tokens
        if self.num_first:
            return False
        self.num_first, self.first_at = self.num_tokens, self.last_at
        return True

    @property
    def seconds_per_token(self) -> float | None:
        """Of the rounds after the first; None where there is none."""
        later = self.num_tokens - self.num_first
        return (self.last_at - self.first_at) / later if later else None


_observed: ContextVar[_Observed] = ContextVar("observed")


class Observer:
    """Observes the requests of one API: `Middleware` wraps the API, `generation` wraps each completion."""

    def __init__(self, config: AppConfig, metrics: RequestMetrics) -> None:
        self._config, self.metrics = config, metrics

    async def generation(self, completion: Completion, events: Events) -> Events:
        """``events`` unchanged. Closing the generator closes ``events``."""
        observed = _observed.get()
        strategy = completion.rapid.strategy or self._config.speculation.strategy
        texts: list[str] = []
        choices: dict[int, _Written] = defaultdict(_Written)  # n was not checked yet
        finished: list[Finish] = []
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Started | PromptScored):
                        yield event
                        continue
                    choice = choices[event.choice]
                    if isinstance(event, Finish):
                        finished.append(event)
                        self.metrics.finished(event, choice.seconds_per_token)
                    else:
                        if choice.push(len(event.tokens)) and "first_token_ms" not in observed.fields:
                            observed.fields["first_token_ms"] = round(observed.seconds * 1e3, 2)
                            self.metrics.first_tokens(strategy, observed.seconds)
                        self.metrics.round(strategy, event)
                    if self._config.observability.log_prompts:
                        texts.append(event.text)
                    yield event
        except Exception as error:
            observed.error = error
            raise
        finally:
            if finished:
                whole = Statistics.of_all([finish.statistics for finish in finished])
                reasons = ",".join(finish.reason for finish in sorted(finished, key=lambda finish: finish.choice))
                observed.fields |= {"finish_reason": reasons, **rapid_object(whole)}
                self.metrics.read(whole)
            observed.fields |= {
                "strategy": strategy,
                "stream": completion.stream,
                "user": hashlib.sha256(completion.user.encode()).hexdigest()[:16] if completion.user else None,
                "emitted": sum(c.num_tokens for c in choices.values()),
            }
            if self._config.observability.log_prompts:
                asked = completion.model_dump(include={"messages", "prompt"})
                observed.fields |= {**asked, "answer": "".join(texts)}


class Middleware:
    """Names each request of ``app``, counts it, and logs it when it has ended.

    Args:
        returns_id: whether answers get the request's name as a header, which a proxy in front may do instead.
    """

    def __init__(self, app: ASGIApp, observer: Observer, *, returns_id: bool) -> None:
        self._app, self._metrics, self._returns_id = app, observer.metrics, returns_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get(ID_HEADER, uuid.uuid4().hex)[:ID_CHARACTERS]
        observed = _Observed(request_id)
        _observed.set(observed)

        is_head = scope["method"] == "HEAD"
        if is_head:  # what GET answers, without the body; FastAPI's routes know no HEAD
            scope = {**scope, "method": "GET"}

        async def watch(message: Message) -> None:
            if is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            if message["type"] == "http.response.start":
                observed.status = message["status"]
                if self._returns_id:
                    MutableHeaders(scope=message)[ID_HEADER] = request_id
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                observed.is_complete = True

        self._metrics.began()
        try:
            await self._app(scope, receive, watch)
        except ClientDisconnect:
            raise
        except Exception as error:  # unexpected: the line in the log has the traceback
            observed.error = error
            if observed.status is not None:
                raise
            await error_response(error, scope["path"])(scope, receive, watch)
        finally:
            observed.error = observed.error or scope.get("state", {}).get("error")
            self._ended(scope, observed)

    def _ended(self, scope: Scope, observed: _Observed) -> None:
        # The route's pattern: a path may hold a name that a client chose.
        endpoint = getattr(scope.get("route"), "path", "other")
        status = observed.status or CLIENT_LEFT
        code = None
        if observed.error is not None:
            shown = as_rapid_error(observed.error)
            status, code = shown.status, shown.code
        elif not observed.is_complete:
            status = CLIENT_LEFT
        self._metrics.ended(endpoint, status, observed.seconds)
        if scope["method"] == "GET" and status < 400:
            return
        seconds = round(observed.seconds, 3)
        fields = {"endpoint": endpoint, "status": status, "error": code, "duration_s": seconds} | observed.fields
        failed = observed.error if status >= 500 else None
        logger.log(
            logging.ERROR if failed else logging.INFO,
            "%s %s ended with %d after %.3f s",
            scope["method"],
            endpoint,
            status,
            seconds,
            extra=fields,
            exc_info=failed,
        )
