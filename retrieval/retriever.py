"""Choose the pieces of a long context that matter to a query: the drafter's context C^S (arXiv 2502.20330)."""

from __future__ import annotations

import hashlib
import json
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from retrieval.caches import CutCache
from retrieval.calibration import UNCALIBRATED, Calibration
from retrieval.chunking import Tokenizer
from retrieval.deadline import TimeLeft
from retrieval.kept import KeptVectors
from retrieval.options import MAX_PAIR_TOKENS, MAX_QUERY_CHARACTERS, RetrievalOptions, TenantOptions
from retrieval.results import IndexProgress, Retrieval, RetrievedChunk, Search, TextLengths
from retrieval.vectors import VECTORS, ChunkVectors, embed_chunks, embed_query

if TYPE_CHECKING:
    from retrieval.embedding import Embedder
    from retrieval.store import ChunkStore

_STORE_TIME_S = 10.0  # for all calls of a store's server in one retrieval
_BATCH = 8  # chunks between two progress reports of `keep`
_STEP = 32  # chunks that are cut, embedded or reranked in one step of a retrieval, at most
_STEP_CHARACTERS = 8192  # that are embedded in one step, about: others wait for its end, and so does who leaves
_LOCKS = 64

Result = TypeVar("Result")


class Retriever:
    """Chunks, embeds, stores, searches and deletes, in one call. Several threads may call it.

    Args:
        tokenizer: the target's; budgets are counted in its tokens.
        kept: bounds what requests leave in the store (`RetrievalOptions.keep`); by default it does not outlive this
            process.
        calibration: the embedder's.
        rerank: orders the best chunks anew: (query, texts) → scores (`retrieval.reranking`).
    """

    def __init__(
        self,
        embedder: Embedder,
        store: ChunkStore,
        tokenizer: Tokenizer,
        kept: KeptVectors | None = None,
        *,
        calibration: Calibration = UNCALIBRATED,
        rerank: Callable[[str, Sequence[str]], list[float]] | None = None,
    ) -> None:
        self.embedder, self._store, self._cuts = embedder, store, CutCache(tokenizer)
        self._kept = kept or KeptVectors()
        self._calibration, self._rerank = calibration, rerank
        self._keeping: dict[str, object] = {}  # by namespace: the latest `keep`, unless deleted since
        # By namespace: who stores or deletes one must not wait for another's whole document.
        self._storing = [threading.Lock() for _ in range(_LOCKS)]

    def retrieve(self, contents: Sequence[str], query: str, options: RetrievalOptions) -> Retrieval:
        """Return the chunks of `contents` nearest to `query`, in document order.

        The best chunks are taken first, until the budget is spent. If a chunk does not fit any more, the next best one
        that fits is taken. Blank chunks are never kept. Nothing is kept when the query is blank. Of a long query the
        first `MAX_QUERY_CHARACTERS` are read.

        Raises RetrievalError when the store fails.
        """
        for step in self.steps(contents, query, options):
            if step is not None:
                return step
        raise AssertionError("the last step is the result")

    def steps(self, contents: Sequence[str], query: str, options: RetrievalOptions) -> Iterator[Retrieval | None]:
        """`retrieve` in small steps, the last of which is the result. Closing the iterator ends the work."""
        began = time.perf_counter()
        chunks, context_tokens = yield from self._cut(contents, options)
        found = yield from self._choose(chunks, context_tokens, query, options)
        yield replace(found, elapsed_ms=(time.perf_counter() - began) * 1000)

    def retrieve_from(
        self, chunks: Sequence[RetrievedChunk], context_tokens: int, query: str, options: RetrievalOptions
    ) -> Retrieval:
        """`retrieve`, for a context that was cut already: what `chunks` returned."""
        return _result(self._choose(chunks, context_tokens, query, options))

    def lengths(self, texts: Sequence[str]) -> TextLengths:
        """Return how many tokens each text has, and how many are read of it."""
        pair = MAX_PAIR_TOKENS if self._rerank else None
        return TextLengths(self.embedder.lengths(texts), self.embedder.max_tokens, pair)

    def rerank(self, query: str, texts: Sequence[str], tenant: str = "") -> list[float]:
        """Return how well each text answers `query`: the reranker's score, or without one the cosine similarity."""
        if self._rerank:
            return self._rerank(query, texts)
        similarities: list[float] = (
            self.embedder.embed(texts, tenant) @ self.embedder.embed_query(query, tenant)
        ).tolist()
        return similarities

    def chunks(self, contents: Sequence[str], options: RetrievalOptions) -> tuple[list[RetrievedChunk], int]:
        """Return the chunks of `contents` that are not blank, and the tokens of all chunks."""
        return _result(self._cut(contents, options))

    def search(self, chunks: Sequence[RetrievedChunk], query: str, options: RetrievalOptions) -> Search:
        """Rank `chunks` (from the method `chunks`) by the method of `options`.

        A content whose vectors are kept (by `keep`, or by this call) has a namespace of its own. The other contents
        share a namespace, which is deleted afterwards.

        Raises RetrievalError when the store fails.
        """
        return _result(self._search(chunks, query[:MAX_QUERY_CHARACTERS], options))

    def _cut(
        self, contents: Sequence[str], options: RetrievalOptions
    ) -> Generator[None, None, tuple[list[RetrievedChunk], int]]:
        chunks: list[RetrievedChunk] = []
        context_tokens, (tenant, _) = 0, _whose(options)
        for content, text in enumerate(contents):
            for number, chunk in enumerate(self._cuts.split(text, options.longest_chunk, tenant), 1):
                context_tokens += chunk.num_tokens
                if chunk.text.strip():
                    chunks.append(RetrievedChunk(content, len(chunks), *chunk, score=0.0))
                if number % _STEP == 0:
                    yield
        return chunks, context_tokens

    def _choose(
        self, chunks: Sequence[RetrievedChunk], context_tokens: int, query: str, options: RetrievalOptions
    ) -> Generator[None, None, Retrieval]:
        began = time.perf_counter()
        query = query[:MAX_QUERY_CHARACTERS]
        asks = bool(chunks and query.strip())
        search = (yield from self._search(chunks, query, options)) if asks else Search([], {})
        is_sparse = options.method == "sparse"
        threshold = self._calibration.threshold if options.threshold is None else options.threshold
        reaching = [i for i in search.order if is_sparse or search.scores.get(i, -1.0) >= threshold]
        order = reaching if reaching and options.method == "dense" else search.order
        if asks and not order:  # no chunk has a word of the query
            order = list(range(len(chunks)))
        if self._rerank:
            best, rest = order[: options.rerank_candidates], order[options.rerank_candidates :]
            scores: dict[int, float] = {}
            for first in range(0, len(best), _STEP):
                read = best[first : first + _STEP]
                scores.update(zip(read, self._rerank(query, [chunks[i].text for i in read]), strict=True))
                yield
            order = sorted(best, key=lambda i: -scores[i]) + rest

        kept: list[RetrievedChunk] = []
        left = options.budget(context_tokens)
        for i in order:
            if chunks[i].num_tokens <= left:
                left -= chunks[i].num_tokens
                kept.append(replace(chunks[i], score=search.scores.get(i, 0.0)))
        confidence = self._calibration.by_words if is_sparse else self._calibration.by_cosine
        return Retrieval(
            chunks=tuple(sorted(kept, key=lambda chunk: chunk.position)),
            context_tokens=context_tokens,
            retrieved_tokens=sum(chunk.num_tokens for chunk in kept),
            num_chunks=len(chunks),
            elapsed_ms=(time.perf_counter() - began) * 1000,
            reaches_threshold=bool(reaching),
            confidence=confidence.of([search.scores.get(i, 0.0) for i in range(len(chunks))]) if kept else 0.0,
        )

    def _search(
        self, chunks: Sequence[RetrievedChunk], query: str, options: RetrievalOptions
    ) -> Generator[None, None, Search]:
        tenant, client = _whose(options)
        left = TimeLeft(_STORE_TIME_S)
        asked = embed_query(self.embedder, query, options.method, tenant)
        passing: list[list[RetrievedChunk]] = []
        positions: dict[tuple[str, int], list[int]] = defaultdict(list)  # by place: equal contents are kept once
        temporary = uuid.uuid4().hex
        done_with = []  # namespaces that are deleted after the search, which may need one that made room for another
        try:
            for _, of_content in groupby(chunks, key=lambda chunk: chunk.content):
                group = list(of_content)
                texts = [chunk.text for chunk in group]
                namespace = self._kept_namespace(texts, tenant)
                # An interrupted write leaves fewer points than texts, and is repeated.
                with self._store.within(left):
                    is_kept = self._store.count(namespace) == len(group)
                if not is_kept and options.keep:
                    removed = self._kept.reserve(namespace, client, self._num_numbers(group))
                    if removed is not None:
                        done_with += removed
                        vectors = yield from self._embed([texts], tenant)
                        with self._changing(namespace), self._store.within(left):
                            self._store.add(namespace, vectors, keep=True)
                        is_kept = True
                if is_kept:
                    if options.keep:
                        self._kept.use(namespace)
                    for i, chunk in enumerate(group):
                        positions[namespace, i].append(chunk.position)
                else:
                    passing.append(group)
            if passing:
                words_only = options.method == "sparse"
                texts_by_content = [[chunk.text for chunk in group] for group in passing]
                vectors = yield from self._embed(texts_by_content, tenant, words_only=words_only)
                with self._store.within(left):
                    self._store.add(temporary, vectors)
                for i, chunk in enumerate(chunk for group in passing for chunk in group):
                    positions[temporary, i].append(chunk.position)
            namespaces = list(dict.fromkeys(namespace for namespace, _ in positions))
            with self._store.within(left):
                hits = self._store.search(namespaces, asked, limit=len(positions))
        finally:
            if passing:
                self._store.delete(temporary)
            for old in done_with:
                self.delete(old)
        ranked = [(-score, i) for place, score in hits.ranking.items() for i in positions[place]]
        scores = {i: score for place, score in hits.scores.items() for i in positions[place]}
        return Search([i for _, i in sorted(ranked)], scores)

    def _embed(
        self, contents: list[list[str]], tenant: str, *, words_only: bool = False
    ) -> Generator[None, None, ChunkVectors]:
        """`embed_chunks` in steps."""
        if words_only and not self.embedder.has_sparse:
            yield
            return embed_chunks(self.embedder, contents, words_only=True)
        texts = [text for content in contents for text in content]
        vectors = []
        first = 0
        while first < len(texts):
            longest = max(map(len, texts[first : first + _STEP]))
            end = first + min(_STEP, max(1, _STEP_CHARACTERS // longest))
            vectors.append(self.embedder.embed(texts[first:end], tenant))
            first = end
            yield
        return embed_chunks(self.embedder, contents, dense=np.concatenate(vectors), salt=tenant)

    def _num_numbers(self, chunks: Sequence[RetrievedChunk]) -> int:
        """About how many numbers the vectors of `chunks` have: two dense ones each, and a weight of each token."""
        num_dense: int = len(chunks) * self.embedder.dimension
        return 2 * (num_dense + sum(chunk.num_tokens for chunk in chunks))

    def keep(self, text: str, chunk_tokens: int, tenant: str = "") -> Iterator[IndexProgress]:
        """Embed `text` and leave its vectors in the store, for every later `retrieve` of `tenant` with that content.

        Yields the progress, first before any work and then after each small batch. Vectors that are kept already are
        not computed again. Blank chunks do not count. After a `delete` in between it stores nothing and ends.

        Raises RetrievalError when the store fails, ValueError when `chunk_tokens` is less than 1.
        """
        texts = [c.text for c in self._cuts.split(text, chunk_tokens, tenant) if c.text.strip()]
        namespace = self._kept_namespace(texts, tenant)
        done = len(texts) if self._store.count(namespace) == len(texts) else 0
        yield IndexProgress(namespace, done, len(texts))
        if done < len(texts):
            self._keeping[namespace] = this = object()
            vectors: list[NDArray[np.float32]] = []
            for first in range(0, len(texts), _BATCH):
                vectors.append(self.embedder.embed(texts[first : first + _BATCH], tenant))
                done += len(vectors[-1])
                if done < len(texts):
                    yield IndexProgress(namespace, done, len(texts))
            whole = embed_chunks(self.embedder, [texts], dense=np.concatenate(vectors), salt=tenant)
            with self._changing(namespace):
                if self._keeping.get(namespace) is not this:
                    return
                self._store.add(namespace, whole, keep=True)
                del self._keeping[namespace]
            yield IndexProgress(namespace, done, len(texts))
        self._kept.release(namespace)  # no request's any more: only `delete` removes them

    def delete(self, namespace: str) -> None:
        """Delete the kept vectors of `namespace`. Raises RetrievalError when the store fails."""
        with self._changing(namespace):
            self._keeping.pop(namespace, None)
            self._store.delete(namespace)
            self._kept.release(namespace)

    def _changing(self, namespace: str) -> threading.Lock:
        return self._storing[hash(namespace) % _LOCKS]

    def _kept_namespace(self, texts: list[str], tenant: str) -> str:
        # The name depends on everything that determines the vectors. So after a change of contents, chunk size,
        # tokenizer or embedder no old vectors are found.
        made_by = [VECTORS, self.embedder.name, self.embedder.dimension, self.embedder.max_tokens]
        identity = json.dumps([*made_by, texts])
        identity += tenant
        return hashlib.sha256(identity.encode()).hexdigest()


def _whose(options: RetrievalOptions) -> tuple[str, str]:
    """(tenant, client)."""
    return (options.tenant, options.client) if isinstance(options, TenantOptions) else ("", "")


def _result(steps: Generator[None, None, Result]) -> Result:
    """Take all `steps`, and return what they end with."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result
