"""The Retriever: embedder and vector store behind one call."""

import asyncio

from ray import serve

from deployments.assembly import build_retriever
from deployments.config import RetrieverConfig
from retrieval import Retrieval, RetrievalOptions


@serve.deployment
class RetrieverReplica:
    """Retrieves in threads, so that a long document does not hold up its neighbours' queries."""

    def __init__(self, config: RetrieverConfig, target_model: str) -> None:
        self._retriever = build_retriever(config, target_model)

    async def retrieve(self, contents: list[str], query: str, options: RetrievalOptions) -> Retrieval:
        return await asyncio.to_thread(self._retriever.retrieve, contents, query, options)
