"""Vectors in Qdrant: in this process, or on a server. Only this module imports Qdrant's client.

Every point belongs to a namespace (one request, or one kept document) and is invisible to all others. It has two
dense vectors and a sparse one (`retrieval.vectors`). In-process Qdrant loses its points when the process ends. So kept
vectors also lie in a folder, one file of numbers for each namespace; the first use of a namespace loads its file.
(Qdrant's own folder admits one process, and reads all of it to start.)
"""

from __future__ import annotations

import os
import threading
import time
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
from qdrant_client import QdrantClient, models
from qdrant_client.common.client_exceptions import QdrantException
from qdrant_client.http.exceptions import ApiException, UnexpectedResponse

from retrieval.deadline import TimeLeft
from retrieval.errors import RetrievalError, StoreTimeout
from retrieval.sparse import SparseVector
from retrieval.vectors import ChunkVectors, Hits, Place, Query

# Of reciprocal rank fusion, 1 / (k + rank). Qdrant's own default is 2; the papers' is 60. On half of QMSum's meetings 2
# finds 46.8% of the gold text and 10 finds 49.7%. 60 loses answers that words find and an English embedder does not.
_RRF_K = 10
_DENSE = {"dense": models.Distance.COSINE, "context": models.Distance.DOT}
_BATCH = 256  # points a message; a server refuses messages over 32 MB
_LOCKS = 64
_TIMEOUT_S = 2  # of one call
_SILENT_S = 1.0  # after a call without an answer others fail at once
_POINT_IDS = uuid.UUID("6f0f6c1e-6f5b-4a57-9d4c-2f1d3c7a9b10")


class ChunkStore:
    """Dense, sparse and hybrid search over the vectors of some namespaces.

    Args:
        url: a Qdrant server, such as "http://qdrant:6333"; None keeps everything in this process's memory.
        api_key: the server's key, if it needs one.
        collection: the collection of the points; it is created when missing.
        folder: where kept vectors outlive this process, without a server; None: they do not.
        dimension: length of the dense vectors.
        idf: whether terms are weighted by their rarity in the namespaces that are searched, as BM25 needs it.

    Several threads may call it. Every method, and the constructor, raises RetrievalError when the server cannot be
    reached or refuses, and its kind StoreTimeout when the server does not answer; the constructor raises RetrievalError
    also when the collection holds other vectors.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        collection: str = "rapid_chunks",
        dimension: int,
        folder: Path | None = None,
        idf: bool = True,
    ) -> None:
        self._url, self._collection, self._dimension = url, collection, dimension
        self._modifier = models.Modifier.IDF if idf else None
        self._folder = folder if url is None else None
        # In-process Qdrant has no locks of its own, and its collections share nothing. A server's client needs none.
        self._locks: list[AbstractContextManager[Any]] = [nullcontext()]
        self._silent_until = 0.0
        self._budget = threading.local()  # `left` has what the calling thread may spend, in `within`
        if url is None:
            self._locks = [threading.Lock() for _ in range(_LOCKS)]
            self._client = QdrantClient(location=":memory:")
            return
        try:
            self._client = QdrantClient(url=url, api_key=api_key, timeout=_TIMEOUT_S, check_compatibility=False)
        except ValueError as error:
            raise RetrievalError(f"{url!r} is not a Qdrant server's URL ({error}): give http://host:port") from error
        with self._calling(collection):
            self._ensure(collection)

    def add(self, namespace: str, vectors: ChunkVectors, *, keep: bool = False) -> None:
        """Store `vectors`; row i becomes position i. Adding the same rows again changes nothing.

        With `keep` they outlive this process, if there is a folder or a server.
        """
        self._upsert(namespace, vectors)
        if keep and self._folder:
            with self._calling(self._collection_of(namespace)):
                self._folder.mkdir(parents=True, exist_ok=True)
                unfinished = self._folder / f".{uuid.uuid4().hex}.npz"
                vectors.save(unfinished)
                os.replace(unfinished, self._folder / f"{namespace}.npz")

    def search(self, namespaces: Sequence[str], query: Query, *, limit: int) -> Hits:
        """Rank the chunks of `namespaces` together; `limit` is at least their number.

        A dense query ranks by cosine, a sparse one by BM25 (chunks without any of its terms are not found), and a query
        with both by fused ranks: of the cosines of the chunks in their context, and of BM25. Equal ones come in order
        of namespace and position.
        """
        with (
            self._together(namespaces) as (collection, among),
            self._calling(collection) if collection else nullcontext(),
        ):
            if collection is None or (self._url is None and self._is_missing(collection)):
                return Hits({}, {})
            corpus = models.SearchParams(idf=models.IdfCorpusParams(corpus=among)) if self._uses_corpus else None
            terms = _sparse(query.sparse) if query.sparse is not None and len(query.sparse.indices) else None
            dense = None if query.dense is None else query.dense.tolist()

            def asking(what: Any, **how: Any) -> models.QueryRequest:
                return models.QueryRequest(
                    query=what, filter=among, limit=limit, with_payload=["namespace", "position"], **how
                )

            requests = []
            if dense is not None:
                requests.append(asking(dense, using="dense"))
            elif terms is not None:
                requests.append(asking(terms, using="sparse", params=corpus))
            if dense is not None and query.sparse is not None:
                sources = [models.Prefetch(query=dense, using="context", limit=limit)]
                if terms is not None:
                    sources.append(models.Prefetch(query=terms, using="sparse", limit=limit, params=corpus))
                requests.append(asking(models.RrfQuery(rrf=models.Rrf(k=_RRF_K)), prefetch=sources))
            found = [
                _ranked(answer.points, namespaces) for answer in self._client.query_batch_points(collection, requests)
            ]
        return Hits(found[-1], found[0]) if found else Hits({}, {})

    def count(self, namespace: str) -> int:
        """Return the number of vectors in the namespace, kept ones included."""
        collection = self._collection_of(namespace)
        with self._calling(collection):
            if not self._is_missing(collection):
                return self._count(collection, namespace)
            kept = self._folder / f"{namespace}.npz" if self._folder else None
            try:
                vectors = ChunkVectors.load(kept) if kept and kept.is_file() else None
            except (ValueError, EOFError, KeyError, zipfile.BadZipFile):  # a crash cut it short: it is missing
                vectors = None
        if vectors is None:
            return 0
        self._upsert(namespace, vectors)
        with self._calling(collection):
            return self._count(collection, namespace)

    def _count(self, collection: str, namespace: str) -> int:
        return self._client.count(collection, count_filter=_of(namespace), exact=True).count

    def delete(self, namespace: str) -> None:
        """Delete all vectors of the namespace, if it has any."""
        collection = self._collection_of(namespace)
        with self._calling(collection):
            if self._url is None:
                self._client.delete_collection(collection)
                if self._folder:
                    for suffix in (".npz", ".npy"):  # .npy: kept before there were sparse vectors
                        (self._folder / f"{namespace}{suffix}").unlink(missing_ok=True)
            else:
                self._client.delete(collection, models.FilterSelector(filter=_of(namespace)), wait=True)

    @contextmanager
    def within(self, left: TimeLeft) -> Iterator[None]:
        """Let this thread's calls of a server in the block take what is `left`, which they spend."""
        self._budget.left = left if self._url else None
        try:
            yield
        finally:
            del self._budget.left

    def close(self) -> None:
        """Close the connection, or free the memory."""
        with self._calling(self._collection):
            self._client.close()

    def _collection_of(self, namespace: str) -> str:
        # In-process Qdrant never frees a deleted point, and compares every query with it. So there each namespace has a
        # collection of its own, which is deleted as a whole. A server works best with few collections and many tenants.
        return f"{self._collection}-{namespace}" if self._url is None else self._collection

    @property
    def _uses_corpus(self) -> bool:
        # In process a collection holds one search's chunks alone.
        return self._url is not None and self._modifier is not None

    @contextmanager
    def _together(self, namespaces: Sequence[str]) -> Iterator[tuple[str | None, models.Filter]]:
        """The collection with the points of all `namespaces`, or None if there are none, and the filter for them."""
        among = _of(*namespaces)
        if self._url is not None:
            yield self._collection, among
            return
        collections = []
        for name in map(self._collection_of, namespaces):  # each behind its own lock: no lock is every search's
            with self._calling(name):
                if not self._is_missing(name):
                    collections.append(name)
        if len(collections) < 2:
            yield (collections[0] if collections else None), among
            return
        joined = self._collection_of(uuid.uuid4().hex)
        with self._calling(joined):
            self._ensure(joined)
        try:
            for collection in collections:
                self._copy(collection, joined)
            yield joined, among
        finally:
            with self._calling(joined):
                self._client.delete_collection(joined)

    def _copy(self, collection: str, to: str) -> None:
        """One batch after another, as `_upsert`. Nobody else has ``to`` yet."""
        following: models.ExtendedPointId | None = None
        while True:
            with self._calling(collection):
                if self._is_missing(collection):
                    return
                records, following = self._client.scroll(collection, limit=_BATCH, offset=following, with_vectors=True)
                points = [models.PointStruct(id=r.id, vector=r.vector or {}, payload=r.payload) for r in records]
                self._client.upsert(to, points)
            if following is None:
                return

    def _upsert(self, namespace: str, vectors: ChunkVectors) -> None:
        """One batch after another, so that other threads' calls come in between. A deletion meanwhile ends it."""
        collection = self._collection_of(namespace)
        for begin in range(0, len(vectors), _BATCH):
            points = []
            for position, dense, sparse in vectors.rows(begin, begin + _BATCH):
                named: dict[str, Any] = {name: vector.tolist() for name, vector in dense.items()}
                if len(sparse.indices):
                    named["sparse"] = _sparse(sparse)
                points.append(
                    models.PointStruct(
                        id=str(uuid.uuid5(_POINT_IDS, f"{namespace}/{position}")),
                        vector=named,
                        payload={"namespace": namespace, "position": position},
                    )
                )
            with self._calling(collection):
                if (begin == 0 or self._url is None) and self._is_missing(collection):
                    if begin:
                        return
                    self._ensure(collection)  # a server may have lost it
                self._client.upsert(collection, points, wait=True)

    def _is_missing(self, collection: str) -> bool:
        return not self._client.collection_exists(collection)

    def _ensure(self, collection: str) -> None:
        if not self._client.collection_exists(collection):
            try:
                self._client.create_collection(
                    collection,
                    vectors_config={
                        name: models.VectorParams(size=self._dimension, distance=distance)
                        for name, distance in _DENSE.items()
                    },
                    sparse_vectors_config={"sparse": models.SparseVectorParams(modifier=self._modifier)},
                    # One graph per namespace and none across namespaces, since no search crosses them.
                    hnsw_config=models.HnswConfigDiff(m=0, payload_m=16) if self._url else None,
                )
            except UnexpectedResponse as error:
                if error.status_code != 409:  # another process was faster
                    raise
        if self._url is None:
            return
        self._client.create_payload_index(
            collection, "namespace", models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD, is_tenant=True)
        )
        params = self._client.get_collection(collection).config.params
        sizes = {name: each.size for name, each in params.vectors.items()} if isinstance(params.vectors, dict) else {}
        modifier = (params.sparse_vectors or {}).get("sparse", models.SparseVectorParams()).modifier
        if sizes != dict.fromkeys(_DENSE, self._dimension) or (modifier or None) != self._modifier:
            raise RetrievalError(
                f"Qdrant collection {collection!r} at {self._url} was made for other vectors: lengths "
                f"{sizes or 'unnamed'}, modifier {modifier or 'none'}. This embedder's have length {self._dimension} "
                f"each, and modifier {self._modifier or 'none'}. Delete that collection: what it holds is made again "
                "from the texts."
            )

    def _lock_of(self, collection: str) -> AbstractContextManager[Any]:
        return self._locks[hash(collection) % len(self._locks)]

    @contextmanager
    def _calling(self, collection: str) -> Iterator[None]:
        """Serialise the calls for a collection if the client needs it, and raise a failed call as RetrievalError with
        its place."""
        began = time.monotonic()
        if began < self._silent_until:
            raise StoreTimeout(f"Qdrant at {self._url} did not answer a moment ago.")
        left: TimeLeft | None = getattr(self._budget, "left", None)
        if left is not None and left.seconds <= 0:
            raise StoreTimeout(f"Qdrant at {self._url} is too slow: the time for all calls of a retrieval is over.")
        try:
            with self._lock_of(collection):
                yield
        except OSError as error:
            raise RetrievalError(f"kept vectors cannot be used: {error}. Check the folder and its disk.") from error
        except (ApiException, QdrantException) as error:
            if isinstance(getattr(error, "source", None), httpx.TimeoutException):
                self._silent_until = time.monotonic() + _SILENT_S
                raise StoreTimeout(f"Qdrant at {self._url} has not answered for {_TIMEOUT_S} s.") from error
            raise RetrievalError(
                f"Qdrant at {self._url} cannot be used: {error}. Check the URL, that the "
                "server runs and is reachable from here, and the API key."
            ) from error
        finally:
            if left is not None:
                left.seconds -= time.monotonic() - began


def _of(*namespaces: str) -> models.Filter:
    match = models.MatchAny(any=list(namespaces))
    return models.Filter(must=[models.FieldCondition(key="namespace", match=match)])


def _sparse(vector: SparseVector) -> models.SparseVector:
    return models.SparseVector(indices=vector.indices.tolist(), values=vector.values.tolist())


def _ranked(points: Sequence[models.ScoredPoint], namespaces: Sequence[str]) -> dict[Place, float]:
    """The scores by place, best first."""
    scores = {(str(p.payload["namespace"]), int(p.payload["position"])): float(p.score) for p in points if p.payload}
    first = {namespace: i for i, namespace in reversed(list(enumerate(namespaces)))}
    return dict(sorted(scores.items(), key=lambda hit: (-hit[1], first[hit[0][0]], hit[0][1])))
