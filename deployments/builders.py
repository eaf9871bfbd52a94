"""Puts a retriever and a one-process backend together from the configuration. Nothing here loads Ray."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deployments.config import AppConfig, FilesConfig, RetrieverConfig, read_secrets
from deployments.engine_config import EngineConfig
from deployments.files.indexing import in_threads
from rapid.backend.local import LocalBackend, OnPrefill
from rapid.engine.engine import Engine
from rapid.engine.torch_thread import compute
from rapid.errors import RetrievalFailed
from rapid.kv_cache.memory import return_freed_memory
from rapid.models.info import GraphLimits, RankPlacement
from rapid.models.loader import load_model
from rapid.models.memory import measured_kv_budget
from rapid.models.model import Model
from rapid.models.tensor_parallel import follow
from rapid.text.tokenizer import load_tokenizer
from rapid.weights import embedded_models
from retrieval import IndexProgress, RetrievalError, Retriever, TextLengths
from retrieval.calibration import calibration_of
from retrieval.device import DeviceTurns
from retrieval.kept import KeptVectors


def build_retriever(config: RetrieverConfig, files: FilesConfig | None, target_model: str) -> Retriever:
    """The retriever that ``config`` describes, or QDRANT_API_KEY. Chunks are counted in the target's tokens.

    Without ``files`` no vectors outlive the process, unless a server keeps them.
    """
    from retrieval.embedding import load_embedder, model_folder
    from retrieval.reranking import load_reranker
    from retrieval.store import ChunkStore

    model = embedded_models.resolve(config.embedder)
    embedder = load_embedder(model, device=config.device)
    rerank = load_reranker(config.reranker, embedder, device=config.device) if config.reranker else None
    return_freed_memory()
    named = config.qdrant_api_key
    key = read_secrets(named, "retriever.qdrant_api_key")[0] if named else os.environ.get("QDRANT_API_KEY")
    folder = files.path if files else None
    store = ChunkStore(
        config.qdrant_url,
        api_key=key,
        dimension=embedder.dimension,
        folder=folder and folder / "vectors",
        idf=not embedder.has_sparse,
    )
    kept = KeptVectors(folder, max_mb=config.max_kept_mb, max_age_s=config.kept_for_s)
    calibration = calibration_of(config.embedder, model_folder(model))
    return Retriever(embedder, store, load_tokenizer(target_model), kept, calibration=calibration, rerank=rerank)


class LocalIndexingBackend(LocalBackend):
    """A local backend whose retriever also keeps documents (`deployments.files.indexing.IndexingBackend`).

    Clients take turns with each forward pass, whatever they ask for.
    """

    def __init__(self, target: Engine, drafter: Engine, retriever: Retriever, **how: Any) -> None:
        super().__init__(target, drafter, retriever.retrieve, embed=retriever.embedder.embed, **how)
        self._retriever = retriever

    async def keep(self, text: str, chunk_tokens: int, tenant: str = "") -> AsyncIterator[IndexProgress]:
        with _understood():
            async for kept in in_threads(self._retriever.keep(text, chunk_tokens, tenant)):
                yield kept

    async def delete(self, vectors: str) -> None:
        with _understood():
            await asyncio.to_thread(self._retriever.delete, vectors)

    async def embed(self, texts: list[str], salt: str = "", client: str = "") -> NDArray[np.float32]:
        return await super().embed(texts, salt)

    async def text_lengths(self, texts: list[str], client: str = "") -> TextLengths:
        with _understood():
            return await asyncio.to_thread(self._retriever.lengths, texts)

    async def rerank(self, query: str, texts: list[str], salt: str = "", client: str = "") -> list[float]:
        with _understood():
            return await asyncio.to_thread(self._retriever.rerank, query, texts, salt)


@contextmanager
def _understood() -> Iterator[None]:
    try:
        yield
    except RetrievalError as error:
        raise RetrievalFailed(f"retrieval failed: {error}") from error


@contextmanager
def local_backend(config: AppConfig, *, on_prefill: OnPrefill = lambda *_: None) -> Iterator[LocalIndexingBackend]:
    """The models and the retriever of ``config`` in this process; leaving it ends the engines' threads.

    One engine plays both roles where the configuration says so, or where the two would be the same.
    """
    retriever = compute(build_retriever, config.retriever, config.files, config.target.model)
    retriever.embedder.passes = DeviceTurns(compute)  # pass by pass, so that the engines' come in between
    engines: list[Engine] = []
    try:
        drafts_itself = config.drafting_engine == config.target
        engines.append(build_engine(config.target, drafts=drafts_itself))
        if not drafts_itself:
            engines.append(build_engine(config.drafter))
        yield LocalIndexingBackend(engines[0], engines[-1], retriever, overlap=config.overlaps, on_prefill=on_prefill)
    finally:
        for engine in engines:
            engine.shutdown()


def build_engine(config: EngineConfig, placement: RankPlacement | None = None, *, drafts: bool = True) -> Engine:
    """Loads the model of ``config``, or the first rank's share of it, and starts its engine."""
    model = compute(_load, config, placement)
    max_tokens = config.batch_tokens(model.layout.device.type)
    graphs = GraphLimits(config.graph_seconds, config.graph_memory_gib)
    if config.kv_memory_gib:
        budget = int(config.kv_memory_gib * 2**30)
    else:
        budget = compute(
            measured_kv_budget,
            model,
            share=config.kv_share,
            max_batch_tokens=max_tokens,
            graph_bytes=graphs.bytes,
        )
    return Engine(
        model,
        kv_bytes=budget,
        max_batch_tokens=max_tokens,
        step_budget_ms=config.step_budget_ms,
        max_queued=config.max_queued,
        idle_timeout=config.idle_timeout_s,
        graphs=graphs,
        drafts=drafts,
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
