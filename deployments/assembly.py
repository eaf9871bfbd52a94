"""Puts a retriever and a one-process backend together from the configuration. Nothing here loads Ray."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deployments.config import AppConfig, EngineConfig, RetrieverConfig
from rapid import catalog
from rapid.engine import Engine
from rapid.local import LocalBackend, OnPrefill
from rapid.model import Model
from rapid.tokenization import load_tokenizer
from retrieval import ChunkStore, Retriever, load_embedder


def build_retriever(config: RetrieverConfig, target_model: str) -> Retriever:
    """The retriever that ``config`` describes. Chunks are counted in the target's tokens."""
    embedder = load_embedder(catalog.resolve(config.embedder), device=config.device)
    key = config.qdrant_api_key.get_secret_value() if config.qdrant_api_key else None
    store = ChunkStore(config.qdrant_url, api_key=key, dimension=embedder.dimension)
    return Retriever(embedder, store, load_tokenizer(target_model))


@contextmanager
def local_backend(config: AppConfig, *, on_prefill: OnPrefill = lambda *_: None) -> Iterator[LocalBackend]:
    """The models and the retriever of ``config`` in this process; leaving it ends the engines' threads.

    One engine plays both roles when target and drafter are the same weights.
    """
    retriever = build_retriever(config.retriever, config.target.model)
    engines: list[Engine] = []
    try:
        engines.append(_build_engine(config.target))
        if _weights(config.drafter) != _weights(config.target):
            engines.append(_build_engine(config.drafter))
        yield LocalBackend(engines[0], engines[-1], retriever.retrieve, on_prefill=on_prefill)
    finally:
        for engine in engines:
            engine.shutdown()


def _weights(config: EngineConfig) -> tuple[str, str, str]:
    return config.model, config.dtype, config.device


def _build_engine(config: EngineConfig) -> Engine:
    if config.threads:
        torch.set_num_threads(config.threads)
    model = Model.load(config.model, dtype=config.dtype, device=config.device)
    return Engine(model, max_batch_tokens=config.max_batch_tokens, idle_timeout=config.idle_timeout_s)
