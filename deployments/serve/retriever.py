"""The Retriever: a Serve replica with the embedder and the vector store."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Literal

from ray import serve

from deployments.config import FilesConfig, RetrieverConfig
from deployments.heartbeat import beating
from deployments.serve.worker import prepare_for_streams
from deployments.turns import FairPool
from retrieval import IndexProgress, Retrieval, TenantOptions
from retrieval.device import OneThreadEach

_NUM_QUERIES, _QUERIES_OF_A_CLIENT = 4, 2  # in threads at the same time
_NUM_INDEXED = _NUM_TEXTS = 2


@serve.deployment
class RetrieverReplica:
    """Retrieves in threads, step by step: one client's long documents do not hold up another's query, and nothing goes
    on for a client that has left."""

    def __init__(self, config: RetrieverConfig, files: FilesConfig, target_model: str) -> None:
        from deployments.builders import build_retriever  # here: the process that builds the application needs no torch

        prepare_for_streams()
        self._retriever = build_retriever(config, files, target_model)
        if config.device == "cpu":  # which it shares with engines
            self._retriever.embedder.passes = OneThreadEach()
        self._queries = FairPool(_NUM_QUERIES, "retrieve", per_client=_QUERIES_OF_A_CLIENT, behind_engines=True)
        self._indexing = FairPool(_NUM_INDEXED, "index", behind_engines=True)
        self._texts = FairPool(_NUM_TEXTS, "texts", behind_engines=True)
        computes = self._retriever
        self._methods = {"embed": computes.embedder.embed, "lengths": computes.lengths, "rerank": computes.rerank}

    async def retrieve(
        self, contents: list[str], query: str, options: TenantOptions
    ) -> AsyncIterator[Retrieval | None]:
        """The answer, after as many None as it takes: so a caller can tell a long document from an absent retriever."""

        async def answer() -> AsyncGenerator[Retrieval, None]:
            work = self._retriever.steps(contents, query, options)
            async with aclosing(self._queries.steps(options.client, work)) as steps:
                async for step in steps:
                    if step is not None:
                        yield step

        async with aclosing(beating(answer())) as words:
            async for word in words:
                yield word

    async def keep(self, text: str, chunk_tokens: int, tenant: str = "") -> AsyncIterator[IndexProgress | None]:
        """The progress of `Retriever.keep`, batch by batch."""
        work = self._indexing.steps(tenant, self._retriever.keep(text, chunk_tokens, tenant))
        async with aclosing(beating(work)) as steps:
            async for kept in steps:
                yield kept

    async def compute(
        self, client: str, method: Literal["embed", "lengths", "rerank"], *args: Any
    ) -> AsyncIterator[Any]:
        """What `Embedder.embed`, `Retriever.lengths` or `Retriever.rerank` returns; a stream as that of `retrieve`."""

        async def answer() -> AsyncGenerator[Any, None]:
            yield await self._texts.run(client, self._methods[method], *args)

        async with aclosing(beating(answer())) as words:
            async for word in words:
                yield word

    async def answers(self) -> None:
        """Returns at once, if at all."""

    async def delete(self, vectors: str) -> None:
        """`Retriever.delete`."""
        await asyncio.to_thread(self._retriever.delete, vectors)
