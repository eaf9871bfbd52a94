"""The deployment that listens: the API in its process, everything behind it asked of the Coordinator."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.config import AppConfig
from deployments.http.api import make_api
from deployments.schemas.completions import Completion, Health
from deployments.schemas.events import Events
from deployments.schemas.tokenize import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from rapid.errors import RapidError


class RemoteFiles:
    """`deployments.files.files.Files`, each method asked for with ``call``."""

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        names = ("upload", "list_files", "get", "content", "delete", "warm")
        self.upload, self.list_files, self.get, self.content, self.delete, self.warm = (
            partial(call, f"files.{name}") for name in names
        )


class RemoteService:
    """The Coordinator's `LocalService`, from another process. What is wrong with a request comes back as a value."""

    def __init__(self, coordinator: DeploymentHandle) -> None:
        self._coordinator = coordinator
        self.files = RemoteFiles(self._call)

    async def generate(self, completion: Completion, tenant: str) -> Events:
        events = self._coordinator.options(stream=True).generate.remote(completion, tenant)
        try:
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

    async def tokenize(self, body: TokenizeRequest) -> Tokenized:
        tokenized: Tokenized = await self._call("tokenize", body)
        return tokenized

    async def detokenize(self, body: DetokenizeRequest) -> Detokenized:
        detokenized: Detokenized = await self._call("detokenize", body)
        return detokenized

    async def _call(self, method: str, *args: Any) -> Any:
        result = await self._coordinator.call.remote(method, *args)
        if isinstance(result, RapidError):
            raise result
        return result


@serve.deployment
@serve.ingress()
class Ingress:
    """Serve asks it for the application once it is made, in its own process."""

    def __init__(self, config: AppConfig, coordinator: DeploymentHandle) -> None:
        self._config, self._service = config, RemoteService(coordinator)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self._config, self._service)
