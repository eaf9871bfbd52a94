"""Puts a retriever and a one-process backend together from the configuration. Nothing here loads Ray."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from deployments.config import AppConfig, EngineConfig, FilesConfig, RetrieverConfig
from deployments.files.indexing import in_threads
from rapid.backend.local import LocalBackend, OnPrefill
from rapid.engine.engine import Engine
from rapid.engine.torch_thread import compute
from rapid.errors import RetrievalFailed
from rapid.kv_cache.memory import kv_budget, return_freed_memory
from rapid.models.info import RankPlacement
from rapid.models.loader import load_model
from rapid.models.model import Model
from rapid.models.tensor_parallel import follow
from rapid.text.tokenizer import load_tokenizer
from rapid.weights import embedded_models
from retrieval import IndexProgress, RetrievalError, Retriever


def build_retriever(config: RetrieverConfig, files: FilesConfig, target_model: str) -> Retriever:
    """The retriever that ``config`` describes, or QDRANT_API_KEY. Chunks are counted in the target's tokens."""
    from retrieval.embedding import load_embedder
    from retrieval.store import ChunkStore

    embedder = load_embedder(embedded_models.resolve(config.embedder), device=config.device)
    return_freed_memory()
    configured = config.qdrant_api_key
    key = configured.get_secret_value() if configured else os.environ.get("QDRANT_API_KEY")
    folder = files.path / "vectors"
    store = ChunkStore(config.qdrant_url, api_key=key, dimension=embedder.dimension, folder=folder)
    return Retriever(embedder, store, load_tokenizer(target_model))


class LocalIndexingBackend(LocalBackend):
    """A local backend whose retriever also keeps documents (`deployments.files.indexing.IndexingBackend`)."""

    def __init__(self, target: Engine, drafter: Engine, retriever: Retriever, **how: Any) -> None:
        super().__init__(target, drafter, retriever.retrieve, **how)
        self._retriever = retriever

    async def keep(self, text: str, chunk_tokens: int) -> AsyncIterator[IndexProgress]:
        try:
            async for kept in in_threads(self._retriever.keep(text, chunk_tokens)):
                yield kept
        except RetrievalError as error:
            raise RetrievalFailed(f"retrieval failed: {error}") from error

    async def delete(self, vectors: str) -> None:
        try:
            await asyncio.to_thread(self._retriever.delete, vectors)
        except RetrievalError as error:
            raise RetrievalFailed(f"retrieval failed: {error}") from error


@contextmanager
def local_backend(config: AppConfig, *, on_prefill: OnPrefill = lambda *_: None) -> Iterator[LocalIndexingBackend]:
    """The models and the retriever of ``config`` in this process; leaving it ends the engines' threads.

    One engine plays both roles where the configuration says so, or where the two would be the same.
    """
    retriever = compute(build_retriever, config.retriever, config.files, config.target.model)
    retriever.embedder.run = compute  # pass by pass, so that the engines' come in between
    engines: list[Engine] = []
    try:
        engines.append(build_engine(config.target))
        if config.drafting_engine != config.target:
            engines.append(build_engine(config.drafter))
        yield LocalIndexingBackend(engines[0], engines[-1], retriever, overlap=config.overlaps, on_prefill=on_prefill)
    finally:
        for engine in engines:
            engine.shutdown()


def build_engine(config: EngineConfig, placement: RankPlacement | None = None) -> Engine:
    """Loads the model of ``config``, or the first rank's share of it, and starts its engine."""
    model = compute(_load, config, placement)
    budget = config.kv_memory_gib * 2**30 if config.kv_memory_gib else kv_budget(model.layout.devices)
    return Engine(
        model,
        kv_bytes=int(budget),
        max_batch_tokens=config.max_batch_tokens,
        max_queued=config.max_queued,
        idle_timeout=config.idle_timeout_s,
    )


def follow_engine(config: EngineConfig, placement: RankPlacement) -> None:
    """Loads another rank's share, and computes for the first rank as long as that lives."""
    compute(lambda: follow(_load(config, placement)))


def _load(config: EngineConfig, placement: RankPlacement | None) -> Model:
    # Ray sets one thread for an actor that reserves less than two cores; a forward pass wants them all.
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(config.threads or max(1, cores // config.tensor_parallel))
    return load_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        device_map=config.device_map,
        quantization=config.quantization,
        kv_dtype=config.kv_dtype,
        placement=placement,
    )
