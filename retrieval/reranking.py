"""Rerankers: models that read the query and a passage together, for the best few passages alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from retrieval.embedding import BgeM3Embedder, model_folder
from retrieval.errors import RetrievalError

if TYPE_CHECKING:
    from retrieval.embedding import Embedder

Reranker = Callable[[str, Sequence[str]], list[float]]  # (query, passages) → scores, higher is better

COLBERT = "colbert"
_MAX_TOKENS = 512  # of a query with a passage
_BATCH = {"cpu": 4, "cuda": 64}  # passages in one forward pass


def load_reranker(name: str, embedder: Embedder, *, device: str = "cpu") -> Reranker:
    """Load a reranker.

    Args:
        name: "colbert" for the token vectors of BGE-M3, if that is the embedder; else a cross-encoder's folder or hub
            id, such as BAAI/bge-reranker-v2-m3, which FlagEmbedding's FlagReranker loads.
        embedder: the retriever's embedder. Passes run where its passes run.

    Raises RetrievalError when the model cannot be found or loaded, or "colbert" is asked of another embedder.
    """
    if name == COLBERT:
        if not isinstance(embedder, BgeM3Embedder):
            raise RetrievalError(
                f"reranker {COLBERT} needs BGE-M3 as the embedder, and that is {embedder.name}: name a cross-encoder"
            )
        return embedder.late_interaction
    # This import takes seconds (it includes training code), and few retrievers rerank.
    from FlagEmbedding import FlagReranker  # type: ignore[import-untyped]

    folder = model_folder(name)
    try:
        flag = FlagReranker(str(folder), devices=device, use_fp16=device.startswith("cuda"), max_length=_MAX_TOKENS)
    except Exception as error:  # each file format has its own errors
        raise RetrievalError(
            f"the reranker in {folder} cannot be loaded ({type(error).__name__}: {error}). It needs config.json, the "
            "weights and the tokenizer's files of a sequence classifier with one output."
        ) from error
    if flag.model.config.num_labels != 1:
        raise RetrievalError(f"the model in {folder} has {flag.model.config.num_labels} outputs; a reranker has one")
    size = _BATCH["cpu" if device == "cpu" else "cuda"]

    def rerank(query: str, passages: Sequence[str]) -> list[float]:
        readable = [text.encode("utf-8", "replace").decode("utf-8") for text in (query, *passages)]
        scores: list[float] = []
        for first in range(1, len(readable), size):
            pairs = [(readable[0], passage) for passage in readable[first : first + size]]
            scores += embedder.run(lambda pairs=pairs: _scores(flag, pairs, device))
        return scores

    return rerank


def _scores(flag: Any, pairs: list[tuple[str, str]], device: str) -> list[float]:
    # FlagEmbedding's own call for one device: its `compute_score` may start processes.
    with torch.inference_mode():
        scores: list[float] = flag.compute_score_single_gpu(pairs, batch_size=len(pairs) + 1, device=device)
    return scores
