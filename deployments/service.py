"""The service behind the API, wherever the engines are: reads requests, runs the decode loop, reports health."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from deployments.config import AppConfig
from deployments.files.files import Files, LocalFiles
from deployments.files.indexing import IndexingBackend
from deployments.observability.tracing import Trace
from deployments.schemas.completions import Completion, Health
from deployments.schemas.events import Events, Started
from deployments.schemas.tokenize import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from deployments.schemas.tools import call_format
from rapid.errors import ContextLengthExceeded, EngineLost
from rapid.events import Finish, Statistics
from rapid.generate import generate_choices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Service(Protocol):
    """`LocalService`, or one in another process (`deployments.serve.ingress`). ``tenant`` is the client's."""

    @property
    def files(self) -> Files: ...

    def generate(self, completion: Completion, tenant: str) -> Events: ...
    async def health(self) -> Health: ...
    async def window(self) -> int: ...
    async def tokenize(self, body: TokenizeRequest) -> Tokenized: ...
    async def detokenize(self, body: DetokenizeRequest) -> Detokenized: ...


class LocalService:
    """A service over the engines that ``backend`` reaches from this process."""

    def __init__(self, config: AppConfig, backend: IndexingBackend, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._backend, self._tokenizer = config, backend, tokenizer
        self.files = LocalFiles(config, backend, tokenizer)

    async def generate(self, completion: Completion, tenant: str) -> Events:
        """Writes the choices of one completion. Closing the generator frees everything that they hold.

        Raises:
            RapidError: the request is wrong, or an engine failed.
        """
        async with self.files.attachments.read(completion, tenant) as whole:
            # In a thread: tokenizing a book takes a second, and the rounds of other requests go on meanwhile.
            request = await asyncio.to_thread(whole.read, self._tokenizer, self._config)
            if whole is not completion:  # the vectors of its files are kept already, until the files are deleted
                request = replace(request, retrieval=replace(request.retrieval, keep=False))
            num_tokens = len(request.prompt.tokens)
            calls = call_format(self._tokenizer) if completion.tools_in_use else None
            if completion.max_tokens == 0 and num_tokens > (window := await self.window()):
                raise ContextLengthExceeded(prompt_tokens=num_tokens, max_tokens=0, window=window, param="prompt")
            yield Started(num_tokens, completion.echoed(self._tokenizer), calls)
            if completion.max_tokens == 0:  # the answer is the prompt, which no engine has to read
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
        """What each running engine holds, and which part is not well that requests can do without.

        Raises:
            EngineLost: the target is not well.
        """
        engines, problems = await self._backend.vitals()
        if problem := problems.get("target"):
            raise EngineLost(f"the target is not well: {problem}")
        return Health(
            status="degraded" if problems else "ok",
            models={role: self._backend.info(role).name for role in engines},
            sequences={role: held.num_sequences for role, held in engines.items()},
            kv_bytes={role: held.kv_bytes for role, held in engines.items()},
            pass_age_s={role: round(held.pulse.pass_age_s, 3) for role, held in engines.items()},
            problems=problems,
        )

    async def window(self) -> int:
        """How many tokens the target can read and write together."""
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
