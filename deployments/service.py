"""The service behind the API, wherever the engines are: reads requests, runs the decode loop, reports health."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from deployments.config import AppConfig
from deployments.datastores import Datastores
from deployments.embedding import TextModels
from deployments.files.batch_records import Batches
from deployments.files.batches import StoredBatches
from deployments.files.files import Files, LocalFiles
from deployments.files.indexing import IndexingBackend
from deployments.files.responses import Responses, StoredResponses
from deployments.files.uploads import Uploads
from deployments.observability.tracing import Trace
from deployments.schemas.chat import ChatRequest
from deployments.schemas.completions import Completion
from deployments.schemas.events import Events, PromptScored, Started
from deployments.schemas.health import Health
from deployments.schemas.tokenize import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from deployments.schemas.tools import call_format
from deployments.turns import FairPool
from rapid.errors import ContextLengthExceeded, EngineLost
from rapid.events import Finish, Statistics
from rapid.generate import generate_choices
from rapid.prompt_logprobs import prompt_logprobs
from retrieval import TenantOptions, TextLengths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NUM_READERS = 2  # threads that read requests: they are short work, and the engines need the cores


class Service(Protocol):
    """`LocalService`, or one in another process (`deployments.serve.ingress`). ``tenant`` is the client's."""

    @property
    def files(self) -> Files: ...
    @property
    def responses(self) -> Responses: ...
    @property
    def batches(self) -> Batches: ...
    @property
    def uploads(self) -> Uploads: ...

    def generate(self, completion: Completion, tenant: str) -> Events: ...
    async def health(self) -> Health: ...
    async def window(self) -> int: ...
    async def tokenize(self, body: TokenizeRequest | ChatRequest, tenant: str) -> Tokenized: ...
    async def detokenize(self, body: DetokenizeRequest, tenant: str) -> Detokenized: ...
    async def text_lengths(self, texts: list[str], tenant: str) -> TextLengths: ...
    async def embed(self, texts: list[str], tenant: str) -> NDArray[np.float32]: ...
    async def rerank(self, query: str, texts: list[str], tenant: str) -> list[float]: ...


class LocalService:
    """A service over the engines that ``backend`` reaches from this process.

    ``behind_engines`` is for engines in processes of their own: in this one they need the interpreter, which a thread
    that stands behind them keeps while it is interrupted.
    """

    def __init__(
        self,
        config: AppConfig,
        backend: IndexingBackend,
        tokenizer: PreTrainedTokenizerBase,
        *,
        behind_engines: bool = False,
    ) -> None:
        self._config, self._backend, self._tokenizer = config, backend, tokenizer
        self._readers = FairPool(_NUM_READERS, "read", behind_engines=behind_engines)
        self._datastores = Datastores(config, tokenizer)
        self.files = LocalFiles(config, backend, tokenizer, self._readers, self._datastores)
        self.uploads = self.files.uploads
        files = config.files
        self.batches = StoredBatches(files.path, self.files)
        models = TextModels(backend, config.target.max_queued, config.salt_of)
        self.text_lengths, self.embed, self.rerank = models.lengths, models.embed, models.rerank
        self.responses = StoredResponses(files.path, files.keep_responses_hours, files.max_responses_mb * 1e6)

    async def generate(self, completion: Completion, tenant: str) -> Events:
        """Writes the choices of one completion. Closing the generator frees everything that they hold.

        Raises:
            RapidError: the request is wrong, or an engine failed.
        """
        async with self.files.attachments.read(completion, tenant) as (whole, texts):
            # In a thread: tokenizing a book takes a second, and the rounds of other requests go on meanwhile.
            window = await self.window()
            request = await self._readers.run(tenant, whole.read, self._tokenizer, self._config, window)
            if whole is not completion:  # the vectors of its files are kept already, until the files are deleted
                request = replace(request, retrieval=replace(request.retrieval, keep=False))
            salt = self._config.salt_of(tenant)
            options = TenantOptions(**asdict(request.retrieval), tenant=salt, client=tenant)
            datastore = await asyncio.to_thread(self._datastores.of, salt)
            request = replace(request, salt=salt, retrieval=options, datastore=datastore)
            num_tokens = len(request.prompt.tokens)
            calls = call_format(self._tokenizer) if completion.tools_in_use else None
            if completion.max_tokens == 0 and num_tokens > window:
                raise ContextLengthExceeded(prompt_tokens=num_tokens, max_tokens=0, window=window, param="prompt")
            reasoning = completion.reasoning(self._tokenizer, request.prompt)
            yield Started(num_tokens, completion.echoed(self._tokenizer), calls, reasoning)
            if (num_top := completion.num_prompt_logprobs) is not None:
                yield PromptScored(await prompt_logprobs(request, num_top, self._backend))
            if completion.max_tokens == 0:  # the answer is the prompt
                for choice in range(completion.num_written):
                    statistics = Statistics(request.speculation.strategy, prompt_tokens=num_tokens)
                    yield Finish("", "length", statistics, choice=choice)
                return
            answers: defaultdict[int, list[int]] = defaultdict(list)  # by choice
            with Trace.start(request, self._backend) as trace:
                # No client may have all places, however many choices one of its requests has.
                most, num = self._config.max_in_flight, completion.num_written
                async with aclosing(generate_choices(request, num, trace.backend, at_once=most)) as events:
                    async for event in events:
                        if isinstance(event, Finish):
                            trace.finish(event)
                        else:
                            answers[event.choice] += event.tokens
                        yield event
            for answer in answers.values():
                await asyncio.to_thread(self._datastores.add_answer, salt, answer, texts)

    async def health(self) -> Health:
        """What the running engines hold, and which part is not well that requests can do without.

        One of several targets that hangs is such a part: the others answer.

        Raises:
            EngineLost: no target is well.
        """
        vitals = await self._backend.vitals()
        engines, problems = vitals
        if not vitals.serves("target"):
            raise EngineLost(f"the target is not well: {problems.get('target', 'there is none')}")
        return Health(
            status="degraded" if problems else "ok",
            models={role: self._backend.info(role).name for role in engines},
            sequences={role: sum(each.num_sequences for each in held) for role, held in engines.items()},
            kv_bytes={role: sum(each.kv_bytes for each in held) for role, held in engines.items()},
            pass_age_s={role: round(max(each.pulse.pass_age_s for each in held), 3) for role, held in engines.items()},
            problems=problems,
        )

    async def window(self) -> int:
        """How many tokens the target can read and write together."""
        return self._backend.info("target").window

    async def tokenize(self, body: TokenizeRequest | ChatRequest, tenant: str) -> Tokenized:
        """The tokens of a text, or of the prompt that a chat would have.

        Raises:
            InvalidRequest: the chat template refuses the messages, or the text is far too long.
            FileNotStored: a file of a message is not there.
        """
        special, window = self._config.special_tokens_in_text, await self.window()
        async with self.files.attachments.read(body, tenant) as (whole, _):
            return await self._readers.run(tenant, whole.tokenized, self._tokenizer, window, special_tokens=special)

    async def detokenize(self, body: DetokenizeRequest, tenant: str) -> Detokenized:
        """
        Raises:
            InvalidRequest: there is no such token.
        """
        return await self._readers.run(tenant, body.detokenized, self._tokenizer)
