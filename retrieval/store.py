"""Vectors in Qdrant: in this process, or on a server. Only this module imports Qdrant's client.

Every point belongs to a namespace (one request, or one kept document) and is invisible to all others. In-process Qdrant
loses its points when the process ends. So kept vectors also lie in a folder, one file of numbers for each namespace;
the first use of a namespace loads its file. (Qdrant's own folder admits one process, and reads all of it to start.)
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray
from qdrant_client import QdrantClient, models
from qdrant_client.common.client_exceptions import QdrantException
from qdrant_client.http.exceptions import ApiException, UnexpectedResponse

from retrieval.errors import RetrievalError, StoreTimeout

_BATCH = 256  # points a message; a server refuses messages over 32 MB
_TIMEOUT_S = 2  # of one call
_SILENT_S = 1.0  # after a call without an answer others fail at once
_POINT_IDS = uuid.UUID("6f0f6c1e-6f5b-4a57-9d4c-2f1d3c7a9b10")


class ChunkStore:
    """Cosine search over the vectors of one namespace at a time.

    Args:
        url: a Qdrant server, such as "http://qdrant:6333"; None keeps everything in this process's memory.
        api_key: the server's key, if it needs one.
        collection: the collection of the points; it is created when missing.
        folder: where kept vectors outlive this process, without a server; None: they do not.
        dimension: length of the vectors.

    Several threads may call it. Every method, and the constructor, raises RetrievalError when the server cannot be
    reached or refuses, and its kind StoreTimeout when the server does not answer; the constructor raises RetrievalError
    also when the collection holds vectors of another length.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        collection: str = "rapid_chunks",
        dimension: int,
        folder: Path | None = None,
    ) -> None:
        self._url, self._collection, self._dimension = url, collection, dimension
        self._folder = folder if url is None else None
        # In-process Qdrant has no locks of its own. A server's client needs none.
        self._lock = threading.Lock() if url is None else nullcontext()
        self._silent_until = 0.0
        self._budget = threading.local()  # `left` has the calling thread's seconds, in `within`
        if url is None:
            self._client = QdrantClient(location=":memory:")
            return
        try:
            self._client = QdrantClient(url=url, api_key=api_key, timeout=_TIMEOUT_S, check_compatibility=False)
        except ValueError as error:
            raise RetrievalError(f"{url!r} is not a Qdrant server's URL ({error}): give http://host:port") from error
        with self._calling():
            self._ensure(collection)

    def add(self, namespace: str, vectors: NDArray[np.float32], *, keep: bool = False) -> None:
        """Store `vectors` [n, dimension]; row i becomes position i. Adding the same rows again changes nothing.

        With `keep` they outlive this process, if there is a folder or a server.
        """
        with self._calling():
            self._upsert(namespace, vectors)
            if keep and self._folder:
                self._folder.mkdir(parents=True, exist_ok=True)
                unfinished = self._folder / f".{uuid.uuid4().hex}.npy"
                np.save(unfinished, vectors)
                os.replace(unfinished, self._folder / f"{namespace}.npy")

    def search(
        self, namespace: str, vector: NDArray[np.float32], *, limit: int, threshold: float
    ) -> list[tuple[int, float]]:
        """Return (position, cosine similarity) of the namespace's `limit` nearest vectors that reach `threshold`.

        `vector` is [dimension]. Best first; equal scores come in order of position.
        """
        collection = self._collection_of(namespace)
        with self._calling():
            if self._url is None and self._is_missing(collection):
                return []
            found = self._client.query_points(
                collection,
                query=vector.tolist(),
                query_filter=_of(namespace),
                limit=limit,
                score_threshold=threshold,
                with_payload=["position"],
            )
        hits = [(int(point.payload["position"]), point.score) for point in found.points if point.payload]
        return sorted(hits, key=lambda hit: (-hit[1], hit[0]))

    def count(self, namespace: str) -> int:
        """Return the number of vectors in the namespace, kept ones included."""
        collection = self._collection_of(namespace)
        with self._calling():
            if self._is_missing(collection):
                kept = self._folder / f"{namespace}.npy" if self._folder else None
                if kept is None or not kept.is_file():
                    return 0
                try:
                    self._upsert(namespace, np.load(kept, allow_pickle=False))
                except (ValueError, EOFError):  # a crash cut the file short: it counts as missing
                    return 0
            return self._client.count(collection, count_filter=_of(namespace), exact=True).count

    def delete(self, namespace: str) -> None:
        """Delete all vectors of the namespace, if it has any."""
        collection = self._collection_of(namespace)
        with self._calling():
            if self._url is None:
                self._client.delete_collection(collection)
                if self._folder:
                    (self._folder / f"{namespace}.npy").unlink(missing_ok=True)
            else:
                self._client.delete(collection, models.FilterSelector(filter=_of(namespace)), wait=True)

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Let this thread's calls of a server in the block take `seconds` together, without what comes between them."""
        self._budget.left = seconds if self._url else None
        try:
            yield
        finally:
            del self._budget.left

    def close(self) -> None:
        """Close the connection, or free the memory."""
        with self._calling():
            self._client.close()

    def _collection_of(self, namespace: str) -> str:
        # In-process Qdrant never frees a deleted point, and compares every query with it. So there each namespace has a
        # collection of its own, which is deleted as a whole. A server works best with few collections and many tenants.
        return f"{self._collection}-{namespace}" if self._url is None else self._collection

    def _upsert(self, namespace: str, vectors: NDArray[np.float32]) -> None:
        collection = self._collection_of(namespace)
        if self._is_missing(collection):  # a server may have lost it
            self._ensure(collection)
        for begin in range(0, len(vectors), _BATCH):
            points = [
                models.PointStruct(
                    id=str(uuid.uuid5(_POINT_IDS, f"{namespace}/{position}")),
                    vector=vectors[position].tolist(),
                    payload={"namespace": namespace, "position": position},
                )
                for position in range(begin, min(begin + _BATCH, len(vectors)))
            ]
            self._client.upsert(collection, points, wait=True)

    def _is_missing(self, collection: str) -> bool:
        return not self._client.collection_exists(collection)

    def _ensure(self, collection: str) -> None:
        if not self._client.collection_exists(collection):
            try:
                self._client.create_collection(
                    collection,
                    vectors_config=models.VectorParams(size=self._dimension, distance=models.Distance.COSINE),
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
        vectors = self._client.get_collection(collection).config.params.vectors
        size = vectors.size if isinstance(vectors, models.VectorParams) else None
        if size != self._dimension:
            raise RetrievalError(
                f"Qdrant collection {collection!r} at {self._url} holds vectors of length {size}, but this embedder's "
                f"have {self._dimension}. Name another collection, or delete that one."
            )

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """Serialise calls if the client needs it, and raise a failed call as RetrievalError with its place."""
        began = time.monotonic()
        if began < self._silent_until:
            raise StoreTimeout(f"Qdrant at {self._url} did not answer a moment ago.")
        left = getattr(self._budget, "left", None)
        if left is not None and left <= 0:
            raise StoreTimeout(f"Qdrant at {self._url} is too slow: the time for all calls of a retrieval is over.")
        try:
            with self._lock:
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
                self._budget.left = left - (time.monotonic() - began)


def _of(namespace: str) -> models.Filter:
    return models.Filter(must=[models.FieldCondition(key="namespace", match=models.MatchValue(value=namespace))])
