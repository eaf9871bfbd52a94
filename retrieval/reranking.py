"""Rerankers: models that read the query and a passage together, for the best few passages alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from retrieval.embedding import BgeM3Embedder, load_cross_encoder
from retrieval.errors import RetrievalError
from retrieval.options import MAX_PAIR_TOKENS

if TYPE_CHECKING:
    from retrieval.embedding import Embedder

Reranker = Callable[[str, Sequence[str]], list[float]]  # (query, passages) → scores, higher is better

COLBERT = "colbert"
_BATCH = {"cpu": 4, "cuda": 64}  # passages in one forward pass


def load_reranker(name: str, embedder: Embedder, *, device: str = "cpu") -> Reranker:
    """Load a reranker.

    Args:
        name: "colbert" for the token vectors of BGE-M3, if that is the embedder; else a cross-encoder's folder or hub
            id, such as BAAI/bge-reranker-v2-m3, which FlagEmbedding's FlagReranker loads.
        embedder: the retriever's embedder. Passes take turns with its own.

    Raises RetrievalError when the model cannot be found or loaded, or "colbert" is asked of another embedder.
    """
    if name == COLBERT:
        if not isinstance(embedder, BgeM3Embedder):
            raise RetrievalError(
                f"reranker {COLBERT} needs BGE-M3 as the embedder, and that is {embedder.name}: name a cross-encoder"
            )
        return embedder.late_interaction
    model, tokenizer = load_cross_encoder(name)
    size = _BATCH["cpu" if device == "cpu" else "cuda"]
    model = model.to(device).eval()
    if device.startswith("cuda"):
        model = model.half()
    how = {"truncation": True, "max_length": min(MAX_PAIR_TOKENS, tokenizer.model_max_length), "padding": True}

    def rerank(query: str, passages: Sequence[str]) -> list[float]:
        query, *readable = (text.encode("utf-8", "replace").decode("utf-8") for text in (query, *passages))
        scores: list[float] = []
        for first in range(0, len(readable), size):
            pairs = [(query, passage) for passage in readable[first : first + size]]
            inputs = tokenizer(pairs, return_tensors="pt", **how).to(device)
            scores += embedder.compute(partial(_scores, model, inputs), is_query=False)
        return scores

    return rerank


@torch.inference_mode()
def _scores(model: Any, inputs: Any) -> list[float]:
    # FlagEmbedding's own `compute_score` runs the first batch twice and may start processes.
    scores: list[float] = model(**inputs).logits[:, 0].float().tolist()
    return scores
