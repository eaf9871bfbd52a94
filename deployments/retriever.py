"""The Retriever: embedder and vector store behind one call."""

import asyncio
import os
from collections.abc import AsyncIterator

from ray import serve

from deployments.assembly import build_retriever
from deployments.config import RetrieverConfig
from retrieval import Retrieval, RetrievalOptions


@serve.deployment
class RetrieverReplica:
    """Retrieves in threads, so that a long document does not hold up its neighbours' queries."""

    def __init__(self, config: RetrieverConfig, target_model: str) -> None:
        # Where the engines share its cores they go first: each of their steps is waited for by every request.
        os.nice(19)
        self._retriever = build_retriever(config, target_model)

    async def retrieve(
        self, contents: list[str], query: str, options: RetrievalOptions
    ) -> AsyncIterator[Retrieval | None]:
        """None as soon as a replica has the question, so that whoever asks can tell a long document from nobody there;
        then the answer."""
        yield None
        yield await asyncio.to_thread(self._retriever.retrieve, contents, query, options)
