"""Choose the pieces of a long context that matter to a query: the drafter's context C^S (arXiv 2502.20330)."""

from __future__ import annotations

import hashlib
import json
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from retrieval.chunking import Tokenizer, split
from retrieval.embedding import Embedder

if TYPE_CHECKING:
    from retrieval.store import ChunkStore


@dataclass(frozen=True)
class RetrievalOptions:
    """What to keep of a context.

    The budget in tokens for a context of L tokens is max(min(min_tokens, L), L * fraction), rounded up to whole chunks
    of `chunk_tokens` (paper, section 4.1, where min_tokens is 4096: too much of an 8K window). Chunks that end at a
    separator are shorter than that, and a short message is a chunk by itself, so more chunks than the paper counts fit
    in its budget; of full chunks exactly as many do.

    Attributes:
        chunk_tokens: longest chunk, in the target's tokens.
        threshold: least cosine similarity to the query.
        min_tokens: budget for any context longer than it.
        fraction: share of the context that is kept where that is more.
        max_tokens: a budget that replaces the rule, never exceeded.
        keep: leave the vectors in the store, so that the same contents need no embedding the next time. Nothing removes
            them again.

    Raises ValueError naming the field that is out of range.
    """

    chunk_tokens: int = 512
    threshold: float = 0.3
    min_tokens: int = 1024
    fraction: float = 1 / 24
    max_tokens: int | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, got {self.chunk_tokens}")
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold must be between -1 and 1, got {self.threshold}")
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must not be negative, got {self.min_tokens}")
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction must be between 0 and 1, got {self.fraction}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, or None, got {self.max_tokens}")

    def budget(self, context_tokens: int) -> int:
        """Return how many tokens may be kept of a context of `context_tokens`."""
        if self.max_tokens is not None:
            return self.max_tokens
        tokens = max(min(self.min_tokens, context_tokens), context_tokens * self.fraction)
        return math.ceil(tokens / self.chunk_tokens) * self.chunk_tokens


@dataclass(frozen=True)
class RetrievedChunk:
    """A kept chunk: `text` is `contents[content][start:end]`, of `num_tokens` tokens when tokenised alone.

    `position` counts the chunks of all contents in order, from 0 up to `Retrieval.num_chunks`; `score` is the cosine
    similarity to the query.
    """

    content: int
    position: int
    start: int
    end: int
    text: str
    num_tokens: int
    score: float


@dataclass(frozen=True)
class Retrieval:
    """The kept chunks in document order, out of `num_chunks` that were not blank.

    `context_tokens` is the length of the whole context, `retrieved_tokens` that of the kept chunks.
    """

    chunks: tuple[RetrievedChunk, ...]
    context_tokens: int
    retrieved_tokens: int
    num_chunks: int
    elapsed_ms: float


class Retriever:
    """Chunks, embeds, stores, searches and forgets, in one call. May be called from several threads.

    `tokenizer` is the target's: budgets are counted in its tokens.
    """

    def __init__(self, embedder: Embedder, store: ChunkStore, tokenizer: Tokenizer) -> None:
        self._embedder, self._store, self._tokenizer = embedder, store, tokenizer

    def retrieve(self, contents: Sequence[str], query: str, options: RetrievalOptions) -> Retrieval:
        """Return the chunks of `contents` nearest to `query`, best first until the budget is spent, in document order.

        A chunk that no longer fits is passed over for the next best that does. Blank chunks are never kept; nothing is
        when the query is blank or no chunk reaches the threshold.

        Raises RetrievalError when the store fails.
        """
        began = time.perf_counter()
        # A chunk longer than the whole budget could never be kept.
        chunk_tokens = min(options.chunk_tokens, options.max_tokens or options.chunk_tokens)
        chunks: list[RetrievedChunk] = []
        context_tokens = 0
        for content, text in enumerate(contents):
            for chunk in split(text, max_tokens=chunk_tokens, tokenizer=self._tokenizer):
                context_tokens += chunk.num_tokens
                if chunk.text.strip():
                    chunks.append(RetrievedChunk(content, len(chunks), *chunk, score=0.0))

        kept: list[RetrievedChunk] = []
        left = options.budget(context_tokens)
        if chunks and query.strip():
            for position, score in self._search([chunk.text for chunk in chunks], query, options):
                if chunks[position].num_tokens <= left:
                    left -= chunks[position].num_tokens
                    kept.append(replace(chunks[position], score=score))
        return Retrieval(
            chunks=tuple(sorted(kept, key=lambda chunk: chunk.position)),
            context_tokens=context_tokens,
            retrieved_tokens=sum(chunk.num_tokens for chunk in kept),
            num_chunks=len(chunks),
            elapsed_ms=(time.perf_counter() - began) * 1000,
        )

    def _search(self, texts: list[str], query: str, options: RetrievalOptions) -> list[tuple[int, float]]:
        """Return (index into `texts`, score) of all texts that reach the threshold, best first."""
        owner = self._kept_owner(texts) if options.keep else uuid.uuid4().hex
        try:
            # A write that broke off halfway leaves fewer points than texts, and is done again.
            if not options.keep or self._store.count(owner) != len(texts):
                self._store.add(owner, self._embedder.embed(texts))
            vector = self._embedder.embed_query(query)
            return self._store.search(owner, vector, limit=len(texts), threshold=options.threshold)
        finally:
            if not options.keep:
                self._store.delete(owner)

    def _kept_owner(self, texts: list[str]) -> str:
        # Named by exactly what its points hold, so that no change of contents, chunk size, tokenizer or embedder can
        # find another's vectors.
        identity = json.dumps([self._embedder.name, self._embedder.dimension, self._embedder.max_tokens, texts])
        return hashlib.sha256(identity.encode()).hexdigest()
