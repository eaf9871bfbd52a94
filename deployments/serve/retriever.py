"""The Retriever: a Serve replica with the embedder and the vector store."""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from ray import serve

from deployments.config import FilesConfig, RetrieverConfig
from deployments.files.indexing import in_threads
from deployments.serve.heartbeat import beating
from retrieval import IndexProgress, Retrieval, RetrievalOptions


@serve.deployment
class RetrieverReplica:
    """Retrieves in threads, so that a long document does not hold up the queries of other requests."""

    def __init__(self, config: RetrieverConfig, files: FilesConfig, target_model: str) -> None:
        from deployments.builders import build_retriever  # here: the process that builds the application needs no torch

        # Engines on the same cores go first: every running request waits for each of their steps.
        os.nice(19)
        self._retriever = build_retriever(config, files, target_model)

    async def retrieve(
        self, contents: list[str], query: str, options: RetrievalOptions
    ) -> AsyncIterator[Retrieval | None]:
        """The answer, after as many None as it takes: so a caller can tell a long document from an absent retriever."""

        async def answer() -> AsyncGenerator[Retrieval, None]:
            yield await asyncio.to_thread(self._retriever.retrieve, contents, query, options)

        async with aclosing(beating(answer())) as words:
            async for word in words:
                yield word

    async def keep(self, text: str, chunk_tokens: int, tenant: str = "") -> AsyncIterator[IndexProgress | None]:
        """The progress of `Retriever.keep`, batch by batch."""
        async with aclosing(beating(in_threads(self._retriever.keep(text, chunk_tokens, tenant)))) as steps:
            async for kept in steps:
                yield kept

    async def answers(self) -> None:
        """Returns at once, if at all."""

    async def delete(self, vectors: str) -> None:
        """`Retriever.delete`."""
        await asyncio.to_thread(self._retriever.delete, vectors)
