"""The Retriever: embedder and vector store behind one call."""

import asyncio

from ray import serve

from deployments.config import RetrieverConfig
from rapid import catalog
from rapid.tokenization import load_tokenizer
from retrieval import ChunkStore, Retrieval, RetrievalOptions, Retriever, load_embedder


def build_retriever(config: RetrieverConfig, target_model: str) -> Retriever:
    """The retriever that ``config`` describes. Chunks are counted in the target's tokens."""
    embedder = load_embedder(catalog.resolve(config.embedder), device=config.device)
    key = config.qdrant_api_key.get_secret_value() if config.qdrant_api_key else None
    store = ChunkStore(config.qdrant_url, api_key=key, dimension=embedder.dimension)
    return Retriever(embedder, store, load_tokenizer(target_model))


@serve.deployment
class RetrieverReplica:
    """Retrieves in threads, so that a long document does not hold up its neighbours' queries."""

    def __init__(self, config: RetrieverConfig, target_model: str) -> None:
        self._retriever = build_retriever(config, target_model)

    async def retrieve(self, contents: list[str], query: str, options: RetrievalOptions) -> Retrieval:
        return await asyncio.to_thread(self._retriever.retrieve, contents, query, options)
