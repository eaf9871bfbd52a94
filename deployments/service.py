"""What the API serves, wherever the engines are: reads a request's body, runs the decode loop, tells what is held."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from deployments.config import AppConfig
from deployments.protocol import Completion, Health
from deployments.tracing import Trace
from rapid.backend import Backend
from rapid.generate import generate
from rapid.request import Delta, Finish


class Service(Protocol):
    """`LocalService`, or one that is asked over Ray (`deployments.ingress`)."""

    def generate(self, completion: Completion) -> AsyncGenerator[Delta | Finish, None]: ...
    async def health(self) -> Health: ...


class LocalService:
    """Over engines that ``backend`` reaches from this process."""

    def __init__(self, config: AppConfig, backend: Backend, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._backend, self._tokenizer = config, backend, tokenizer

    async def generate(self, completion: Completion) -> AsyncGenerator[Delta | Finish, None]:
        """Writes one completion, a `Delta` a round and a `Finish`; closing it frees everything that it holds.

        Raises:
            RapidError: what is wrong with the request, or with the engines.
        """
        # Tokenizing a whole book takes a second, and the other requests' rounds must go on meanwhile.
        request = await asyncio.to_thread(completion.read, self._tokenizer, self._config)
        with Trace.start(request, self._backend) as trace:
            async with aclosing(generate(request, trace.backend)) as events:
                async for event in events:
                    if isinstance(event, Finish):
                        trace.finish(event)
                    yield event

    async def health(self) -> Health:
        """What each engine holds that is there; raises when one does not answer."""
        stats = await self._backend.stats()
        return Health(
            status="ok",
            models={role: self._backend.info(role).name for role in stats},
            sequences={role: held.num_sequences for role, held in stats.items()},
            kv_bytes={role: held.kv_bytes for role, held in stats.items()},
        )
