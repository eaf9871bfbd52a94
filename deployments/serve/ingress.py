"""The Ingress: the HTTP API in a process of its own, which loads no model and asks the Coordinator for the rest."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.config import AppConfig
from deployments.heartbeat import heard
from deployments.http.api import make_api
from deployments.schemas.chat import ChatRequest
from deployments.schemas.completions import Completion
from deployments.schemas.events import Events
from deployments.schemas.health import Health
from deployments.schemas.tokenize import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from deployments.serve.metrics import RayExporter
from deployments.serve.ray_errors import understood
from deployments.serve.worker import prepare_for_streams
from rapid.errors import RapidError
from retrieval import TextLengths

_START_LIMIT_S = 300.0  # for the first word: a new coordinator may have to start
_SILENCE_LIMIT_S = 8.0
_CALL_LIMIT_S = 600.0  # an upload is read, a document is warmed
_HEALTH_LIMIT_S = 6.0


class RemotePart:
    """One of the parts that the Coordinator's `LocalService` has (``name``), over ``call``."""

    def __init__(self, call: Callable[..., Awaitable[Any]], name: str) -> None:
        self._call, self._name = call, name

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        return partial(self._call, f"{self._name}.{method}")


class RemoteService:
    """The Coordinator's `LocalService`, from another process. Every error that it raises is a RapidError.

    Errors in a request come back as values, errors of Ray are translated.
    """

    def __init__(self, coordinator: DeploymentHandle) -> None:
        self._remote_call, self._remote_generate = coordinator.call, coordinator.options(stream=True).generate
        self.files, self.uploads, self.batches, self.responses = (
            RemotePart(self._call, part) for part in ("files", "uploads", "batches", "responses")
        )

    async def generate(self, completion: Completion, tenant: str) -> Events:
        events = self._remote_generate.remote(completion, tenant)
        told = heard(events, first_s=_START_LIMIT_S, silent_s=_SILENCE_LIMIT_S)
        try:
            async with aclosing(told):
                with understood("the coordinator", _stopped):
                    async for event in told:
                        if isinstance(event, RapidError):
                            raise event
                        yield event
        finally:
            events.cancel()

    async def health(self) -> Health:
        health: Health = await self._call("health", limit_s=_HEALTH_LIMIT_S)
        return health

    async def window(self) -> int:
        window: int = await self._call("window")
        return window

    async def tokenize(self, body: TokenizeRequest | ChatRequest, tenant: str) -> Tokenized:
        tokenized: Tokenized = await self._call("tokenize", body, tenant)
        return tokenized

    async def detokenize(self, body: DetokenizeRequest, tenant: str) -> Detokenized:
        detokenized: Detokenized = await self._call("detokenize", body, tenant)
        return detokenized

    async def text_lengths(self, texts: list[str], tenant: str) -> TextLengths:
        lengths: TextLengths = await self._call("text_lengths", texts, tenant)
        return lengths

    async def embed(self, texts: list[str], tenant: str) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = await self._call("embed", texts, tenant)
        return vectors

    async def rerank(self, query: str, texts: list[str], tenant: str) -> list[float]:
        scores: list[float] = await self._call("rerank", query, texts, tenant)
        return scores

    async def _call(self, method: str, *args: Any, limit_s: float = _CALL_LIMIT_S) -> Any:
        with understood("the coordinator", _stopped):
            async with asyncio.timeout(limit_s):
                result = await self._remote_call.remote(method, *args)
        if isinstance(result, RapidError):
            raise result
        return result


def _stopped(why: str) -> RapidError:
    message = f"a part of the service stopped while it worked on this request ({why}); try again"
    return RapidError(message, status=503)


@serve.deployment
@serve.ingress()
class Ingress:
    """Builds the API in its replica, where Serve asks for it."""

    def __init__(self, config: AppConfig, coordinator: DeploymentHandle) -> None:
        self._config, self._service = config, RemoteService(coordinator)

    def __serve_build_asgi_app__(self) -> FastAPI:
        prepare_for_streams()
        # Serve's proxy names requests and returns the names itself.
        return make_api(self._config, self._service, exporter=RayExporter(), returns_id=False)
