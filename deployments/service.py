"""What the API serves, wherever the engines are: reads a request's body, runs the decode loop, tells what is held."""

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from deployments.config import AppConfig
from deployments.files.files import Files, IndexingBackend, LocalFiles
from deployments.observability.tracing import Trace
from deployments.schemas.completions import Completion, Health
from deployments.schemas.events import Events, Started
from deployments.schemas.tokenize import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from deployments.schemas.tools import call_format
from rapid.choices import generate_choices
from rapid.errors import ContextLengthExceeded
from rapid.events import Finish, Statistics


class Service(Protocol):
    """`LocalService`, or one that is asked over Ray (`deployments.serve.ingress`). ``tenant`` is who asks."""

    files: Files

    def generate(self, completion: Completion, tenant: str) -> Events: ...
    async def health(self) -> Health: ...
    async def window(self) -> int: ...
    async def tokenize(self, body: TokenizeRequest) -> Tokenized: ...
    async def detokenize(self, body: DetokenizeRequest) -> Detokenized: ...


class LocalService:
    """Over engines that ``backend`` reaches from this process."""

    def __init__(self, config: AppConfig, backend: IndexingBackend, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._backend, self._tokenizer = config, backend, tokenizer
        self.files = LocalFiles(config, backend, tokenizer)

    async def generate(self, completion: Completion, tenant: str) -> Events:
        """Writes the choices of one completion; closing it frees all they hold.

        Raises:
            RapidError: what is wrong with the request, or with the engines.
        """
        async with self.files.read(completion, tenant) as whole:
            # Tokenizing a whole book takes a second, and the other requests' rounds must go on meanwhile.
            request = await asyncio.to_thread(whole.read, self._tokenizer, self._config)
            if whole is not completion:  # its files are kept already, by themselves, and go when they are deleted
                request = replace(request, retrieval=replace(request.retrieval, keep=False))
            num_tokens = len(request.prompt.tokens)
            calls = call_format(self._tokenizer) if completion.tools_in_use else None
            if completion.max_tokens == 0 and num_tokens > (window := await self.window()):
                raise ContextLengthExceeded(prompt_tokens=num_tokens, max_tokens=0, window=window, param="prompt")
            yield Started(num_tokens, completion.echoed(self._tokenizer), calls)
            if completion.max_tokens == 0:  # the prompt is repeated, and no engine has anything to do
                for choice in range(completion.n):
                    statistics = Statistics(request.speculation.strategy, prompt_tokens=num_tokens)
                    yield Finish("", "length", statistics, choice=choice)
                return
            with Trace.start(request, self._backend) as trace:
                async with aclosing(generate_choices(request, completion.n, trace.backend)) as events:
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

    async def window(self) -> int:
        """How many tokens the target can read and write."""
        return self._backend.info("target").window

    async def tokenize(self, body: TokenizeRequest) -> Tokenized:
        """
        Raises:
            InvalidRequest: the chat template refuses the messages.
        """
        return await asyncio.to_thread(body.answer, self._tokenizer, await self.window())

    async def detokenize(self, body: DetokenizeRequest) -> Detokenized:
        """
        Raises:
            InvalidRequest: there is no such token.
        """
        return await asyncio.to_thread(body.answer, self._tokenizer)
