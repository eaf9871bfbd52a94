"""The Ingress: the HTTP API in a process of its own, which loads no model and asks the Coordinator for the rest."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from deployments.config import AppConfig
from deployments.http.api import make_api
from deployments.schemas.completions import Completion, Health
from deployments.schemas.events import Events
from deployments.schemas.tokenize import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from deployments.serve.metrics import RayExporter
from rapid.errors import RapidError


class RemoteFiles:
    """`deployments.files.files.Files` of the Coordinator, over ``call``."""

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        names = ("upload", "list_files", "get", "content", "delete", "warm")
        self.upload, self.list_files, self.get, self.content, self.delete, self.warm = (
            partial(call, f"files.{name}") for name in names
        )


class RemoteService:
    """The Coordinator's `LocalService`, from another process. Every error that it raises is a RapidError.

    Errors in a request come back as values, errors of Ray are translated.
    """

    def __init__(self, coordinator: DeploymentHandle) -> None:
        self._coordinator = coordinator
        self.files = RemoteFiles(self._call)

    async def generate(self, completion: Completion, tenant: str) -> Events:
        events = self._coordinator.options(stream=True).generate.remote(completion, tenant)
        try:
            with _translated():
                async for event in events:
                    if isinstance(event, RapidError):
                        raise event
                    yield event
        finally:
            events.cancel()

    async def health(self) -> Health:
        health: Health = await self._call("health")
        return health

    async def window(self) -> int:
        window: int = await self._call("window")
        return window

    async def tokenize(self, body: TokenizeRequest, tenant: str) -> Tokenized:
        tokenized: Tokenized = await self._call("tokenize", body, tenant)
        return tokenized

    async def detokenize(self, body: DetokenizeRequest, tenant: str) -> Detokenized:
        detokenized: Detokenized = await self._call("detokenize", body, tenant)
        return detokenized

    async def _call(self, method: str, *args: Any) -> Any:
        with _translated():
            result = await self._coordinator.call.remote(method, *args)
        if isinstance(result, RapidError):
            raise result
        return result


@contextmanager
def _translated() -> Iterator[None]:
    """Raises errors of Ray as a RapidError that a client may see."""
    try:
        yield
    except RapidError:  # of the Coordinator: Ray raises these as errors of its own, too
        raise
    except RayError as error:
        message = "a part of the service stopped while it worked on this request; try again"
        raise RapidError(message, status=503) from error


@serve.deployment
@serve.ingress()
class Ingress:
    """Builds the API in its replica, where Serve asks for it."""

    def __init__(self, config: AppConfig, coordinator: DeploymentHandle) -> None:
        self._config, self._service = config, RemoteService(coordinator)

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Serve's proxy names requests and returns the names itself.
        return make_api(self._config, self._service, exporter=RayExporter(), returns_id=False)
