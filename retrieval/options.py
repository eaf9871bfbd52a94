"""How a request retrieves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Method = Literal["dense", "sparse", "hybrid"]
METHODS: tuple[str, ...] = get_args(Method)
MAX_QUERY_CHARACTERS = 32_768  # that are read of a query
MAX_PAIR_TOKENS = 512  # that a cross-encoder reads of a query with a passage


@dataclass(frozen=True)
class RetrievalOptions:
    """How much to keep of a context.

    The budget in tokens for a context of L tokens is max(min(min_tokens, L), L * fraction), rounded up to whole chunks
    of `chunk_tokens` (paper, section 4.1, where min_tokens is 4096: too much of an 8K window). Chunks that end at a
    separator are shorter than `chunk_tokens`, and a short message is a chunk by itself. So the budget holds more chunks
    than the paper counts; it holds exactly as many full chunks.

    Attributes:
        chunk_tokens: longest chunk, in the target's tokens.
        method: "dense" ranks by cosine similarity, as the paper; "sparse" by words, and embeds nothing with an embedder
            that does not weigh words itself; "hybrid" fuses both rankings.
        threshold: least cosine similarity to the query. A dense search keeps only chunks that reach it, a hybrid one
            any chunks as long as one reaches it. None: the embedder's own (`retrieval.calibration`). Words have none.
        min_tokens: budget for any context longer than it.
        fraction: share of the context that is kept where that is more.
        max_tokens: a budget that replaces the rule, never exceeded.
        rerank_candidates: how many of the best chunks a reranker reads, if there is one.
        keep: leave the vectors in the store, so that the same contents need no embedding the next time, as long as
            `KeptVectors` has room for them.

    Raises ValueError naming the field that is out of range.
    """

    chunk_tokens: int = 512
    method: Method = "hybrid"
    threshold: float | None = None
    min_tokens: int = 1024
    fraction: float = 1 / 24
    max_tokens: int | None = None
    rerank_candidates: int = 32
    keep: bool = False

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, got {self.chunk_tokens}")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method}")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold must be between -1 and 1, or None, got {self.threshold}")
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must not be negative, got {self.min_tokens}")
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction must be between 0 and 1, got {self.fraction}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, or None, got {self.max_tokens}")
        if self.rerank_candidates < 1:
            raise ValueError(f"rerank_candidates must be at least 1, got {self.rerank_candidates}")

    @property
    def longest_chunk(self) -> int:
        """Tokens of the longest chunk: one longer than the whole budget could never be kept."""
        return min(self.chunk_tokens, self.max_tokens or self.chunk_tokens)

    def budget(self, context_tokens: int) -> int:
        """Return how many tokens of a context of `context_tokens` may be kept."""
        if self.max_tokens is not None:
            return self.max_tokens
        tokens = max(min(self.min_tokens, context_tokens), context_tokens * self.fraction)
        return math.ceil(tokens / self.chunk_tokens) * self.chunk_tokens


@dataclass(frozen=True)
class TenantOptions(RetrievalOptions):
    """The options of one client's request: it finds kept vectors of its `tenant` alone, and what it leaves counts as
    its `client`'s."""

    tenant: str = ""
    client: str = ""
