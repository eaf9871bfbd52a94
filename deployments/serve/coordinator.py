"""The Coordinator: the service over engines that are leased from Serve's replicas, and streams what comes."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from operator import attrgetter
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.config import AppConfig
from deployments.heartbeat import beating
from deployments.schemas.completions import Completion
from deployments.schemas.events import Event
from deployments.serve.backend import RayBackend
from deployments.serve.worker import prepare_for_streams
from deployments.service import LocalService
from rapid.backend.protocol import Role
from rapid.errors import RapidError
from rapid.text.tokenizer import check_same_tokenizer, load_tokenizer


@serve.deployment
class Coordinator:
    """Holds the tokenizer and no model. Refuses to start when target and drafter do not share a tokenizer.

    What is wrong with a request, and not with the service, is returned instead of raised: Serve would log it as a
    failure of this replica.
    """

    async def __init__(
        self, config: AppConfig, target: DeploymentHandle, drafter: DeploymentHandle, retriever: DeploymentHandle
    ) -> None:
        prepare_for_streams()
        engines: dict[Role, DeploymentHandle] = {"target": target, "drafter": drafter}
        least: dict[Role, int] = {
            "target": config.target.replicas.min,
            "drafter": config.drafting_engine.replicas.min,
        }
        backend = RayBackend(engines, retriever, overlap=config.overlaps, is_colocated=config.colocated, least=least)
        tokenizer = load_tokenizer(config.target.model)
        if config.drafting_engine.model != config.target.model:
            check_same_tokenizer(tokenizer, load_tokenizer(config.drafting_engine.model))
        await backend.connect()
        self._service = LocalService(config, backend, tokenizer, behind_engines=True)

    async def generate(self, completion: Completion, tenant: str) -> AsyncIterator[Event | RapidError | None]:
        """`LocalService.generate`, with None where it takes its time, and what is wrong with the request at the end."""
        try:
            async with aclosing(beating(self._service.generate(completion, tenant))) as events:
                async for event in events:
                    yield event
        except RapidError as error:
            if error.status >= 500:
                raise
            yield error

    async def call(self, method: str, *args: Any) -> Any:
        """Any other method of `LocalService`, or of one of its parts, as "files.<method>"."""
        try:
            return await attrgetter(method)(self._service)(*args)
        except RapidError as error:
            if error.status >= 500:
                raise
            return error
