"""Choose the pieces of a long context that matter to a query: the drafter's context C^S (arXiv 2502.20330)."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from retrieval.chunking import Tokenizer, split

if TYPE_CHECKING:
    from retrieval.embedding import Embedder
    from retrieval.store import ChunkStore

_STORE_TIME_S = 10.0  # for all calls of a store's server in one retrieval
_BATCH = 8  # chunks between two progress reports of `keep`


@dataclass(frozen=True)
class RetrievalOptions:
    """How much to keep of a context.

    The budget in tokens for a context of L tokens is max(min(min_tokens, L), L * fraction), rounded up to whole chunks
    of `chunk_tokens` (paper, section 4.1, where min_tokens is 4096: too much of an 8K window). Chunks that end at a
    separator are shorter than `chunk_tokens`, and a short message is a chunk by itself. So the budget holds more chunks
    than the paper counts; it holds exactly as many full chunks.

    Attributes:
        chunk_tokens: longest chunk, in the target's tokens.
        threshold: least cosine similarity to the query.
        min_tokens: budget for any context longer than it.
        fraction: share of the context that is kept where that is more.
        max_tokens: a budget that replaces the rule, never exceeded.
        keep: leave the vectors in the store, so that the same contents need no embedding the next time. Only
        `Retriever.delete` removes them.

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
        """Return how many tokens of a context of `context_tokens` may be kept."""
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


@dataclass(frozen=True)
class IndexProgress:
    """`num_embedded` of a text's `num_chunks` chunks have vectors, in the store's namespace `namespace`."""

    namespace: str
    num_embedded: int
    num_chunks: int


@dataclass(frozen=True)
class TenantOptions(RetrievalOptions):
    """The options of one tenant's request: it finds kept vectors of this tenant alone."""

    tenant: str = ""


class Retriever:
    """Chunks, embeds, stores, searches and deletes, in one call. Several threads may call it.

    `tokenizer` is the target's: budgets are counted in its tokens.
    """

    def __init__(self, embedder: Embedder, store: ChunkStore, tokenizer: Tokenizer) -> None:
        self.embedder, self._store, self._tokenizer = embedder, store, tokenizer
        self._keeping: dict[str, object] = {}  # by namespace: the latest `keep`, unless deleted since
        self._storing = threading.Lock()

    def retrieve(self, contents: Sequence[str], query: str, options: RetrievalOptions) -> Retrieval:
        """Return the chunks of `contents` nearest to `query`, in document order.

        The best chunks are taken first, until the budget is spent. If a chunk does not fit any more, the next best one
        that fits is taken. Blank chunks are never kept. Nothing is kept when the query is blank or no chunk reaches the
        threshold.

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
            with self._store.within(_STORE_TIME_S):
                found = self._search(chunks, query, options)
            for position, score in found:
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

    def keep(self, text: str, chunk_tokens: int, tenant: str = "") -> Iterator[IndexProgress]:
        """Embed `text` and leave its vectors in the store, for every later `retrieve` of `tenant` with that content.

        Yields the progress, first before any work and then after each small batch. Vectors that are kept already are
        not computed again. Blank chunks do not count. After a `delete` in between it stores nothing and ends.

        Raises RetrievalError when the store fails, ValueError when `chunk_tokens` is less than 1.
        """
        texts = [c.text for c in split(text, max_tokens=chunk_tokens, tokenizer=self._tokenizer) if c.text.strip()]
        namespace = self._kept_namespace(texts, tenant)
        done = len(texts) if self._store.count(namespace) == len(texts) else 0
        yield IndexProgress(namespace, done, len(texts))
        if done < len(texts):
            self._keeping[namespace] = this = object()
            vectors: list[NDArray[np.float32]] = []
            for first in range(0, len(texts), _BATCH):
                vectors.append(self.embedder.embed(texts[first : first + _BATCH]))
                done += len(vectors[-1])
                if done < len(texts):
                    yield IndexProgress(namespace, done, len(texts))
            with self._storing:
                if self._keeping.get(namespace) is not this:
                    return
                self._store.add(namespace, np.concatenate(vectors), keep=True)
                del self._keeping[namespace]
            yield IndexProgress(namespace, done, len(texts))

    def delete(self, namespace: str) -> None:
        """Delete the kept vectors of `namespace`. Raises RetrievalError when the store fails."""
        with self._storing:
            self._keeping.pop(namespace, None)
            self._store.delete(namespace)

    def _search(self, chunks: list[RetrievedChunk], query: str, options: RetrievalOptions) -> list[tuple[int, float]]:
        """Return (position, score) of all `chunks` that reach the threshold, best first.

        A content whose vectors are kept (by `keep`, or by this call) has a namespace of its own. The other contents
        share a namespace, which is deleted afterwards.
        """
        vector = self.embedder.embed_query(query)
        found: list[tuple[int, float]] = []

        def search(namespace: str, among: list[RetrievedChunk]) -> None:
            hits = self._store.search(namespace, vector, limit=len(among), threshold=options.threshold)
            found.extend((among[i].position, score) for i, score in hits)

        tenant = options.tenant if isinstance(options, TenantOptions) else ""
        passing: list[RetrievedChunk] = []
        for _, of_content in groupby(chunks, key=lambda chunk: chunk.content):
            group = list(of_content)
            texts = [chunk.text for chunk in group]
            namespace = self._kept_namespace(texts, tenant)
            # An interrupted write leaves fewer points than texts, and is repeated.
            is_kept = self._store.count(namespace) == len(group)
            if options.keep and not is_kept:
                self._store.add(namespace, self.embedder.embed(texts), keep=True)
            if options.keep or is_kept:
                search(namespace, group)
            else:
                passing += group
        if passing:
            namespace = uuid.uuid4().hex
            try:
                self._store.add(namespace, self.embedder.embed([chunk.text for chunk in passing]))
                search(namespace, passing)
            finally:
                self._store.delete(namespace)
        return sorted(found, key=lambda hit: (-hit[1], hit[0]))

    def _kept_namespace(self, texts: list[str], tenant: str) -> str:
        # The name depends on everything that determines the vectors. So after a change of contents, chunk size,
        # tokenizer or embedder no old vectors are found.
        identity = json.dumps([self.embedder.name, self.embedder.dimension, self.embedder.max_tokens, texts])
        identity += tenant
        return hashlib.sha256(identity.encode()).hexdigest()
