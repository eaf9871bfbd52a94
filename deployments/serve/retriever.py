"""The Retriever: embedder and vector store behind one call."""

import asyncio
import os
from collections.abc import AsyncIterator

from ray import serve

from deployments.builders import build_retriever, in_threads
from deployments.config import FilesConfig, RetrieverConfig
from retrieval import IndexProgress, Retrieval, RetrievalOptions


@serve.deployment
class RetrieverReplica:
    """Retrieves in threads, so that a long document does not hold up its neighbours' queries."""

    def __init__(self, config: RetrieverConfig, files: FilesConfig, target_model: str) -> None:
        # Where the engines share its cores they go first: each of their steps is waited for by every request.
        os.nice(19)
        self._retriever = build_retriever(config, files, target_model)

    async def retrieve(
        self, contents: list[str], query: str, options: RetrievalOptions
    ) -> AsyncIterator[Retrieval | None]:
        """None as soon as a replica has the question, so that whoever asks can tell a long document from nobody there;
        then the answer."""
        yield None
        yield await asyncio.to_thread(self._retriever.retrieve, contents, query, options)

    async def keep(self, text: str, chunk_tokens: int) -> AsyncIterator[IndexProgress]:
        """`Retriever.keep`, batch by batch."""
        async for kept in in_threads(self._retriever.keep(text, chunk_tokens)):
            yield kept

    async def delete(self, vectors: str) -> None:
        await asyncio.to_thread(self._retriever.delete, vectors)
