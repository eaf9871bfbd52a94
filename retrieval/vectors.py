"""What is stored of each chunk, and what is asked with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrieval.sparse import SparseVector, bm25_passages, bm25_query

if TYPE_CHECKING:
    from retrieval.embedding import Embedder

VECTORS = "dense, context, sparse"  # a part of the name of kept vectors: others are not found
# Of each neighbour in a chunk's context vector. Chosen with RRF's k on one half of QMSum's meetings: 44.3% of the gold
# text is found with 0, 45.5% with 0.25, 49.7% with 0.5. `python -m benchmarks.retrieval` has the other half.
_NEIGHBOUR = 0.5


class ChunkVectors(NamedTuple):
    """The vectors of n chunks.

    `dense` [n, dimension] are the embedder's unit vectors. `context` [n, dimension] are these with those of their
    neighbours in the text added (`with_neighbours`): what is asked for often goes on in the next chunk, which does not
    repeat what it is about. Both are None where only words are searched for. `sparse` are BM25's weights, or the
    embedder's own.
    """

    dense: NDArray[np.float32] | None
    context: NDArray[np.float32] | None
    sparse: list[SparseVector]

    def __len__(self) -> int:
        return len(self.sparse)

    def rows(self, begin: int, end: int) -> Iterator[tuple[int, dict[str, NDArray[np.float32]], SparseVector]]:
        """(row, its dense vectors by name, its sparse vector) of the rows from `begin` to `end`."""
        named = {name: vectors for name, vectors in (("dense", self.dense), ("context", self.context))}
        for row in range(begin, min(end, len(self.sparse))):
            yield row, {name: of[row] for name, of in named.items() if of is not None}, self.sparse[row]

    def save(self, path: Path) -> None:
        """Write the vectors to a new file. They must be whole."""
        assert self.dense is not None and self.context is not None
        ends = np.cumsum([len(vector.indices) for vector in self.sparse])
        empty = SparseVector(np.zeros(0, np.uint32), np.zeros(0, np.float32))
        indices, values = (np.concatenate(parts) for parts in zip(empty, *self.sparse, strict=True))
        with path.open("wb") as file:
            np.savez(file, dense=self.dense, context=self.context, ends=ends, indices=indices, values=values)

    @classmethod
    def load(cls, path: Path) -> ChunkVectors:
        """Read what `save` wrote. Raises ValueError, KeyError or another error of zipfile's where it is not whole."""
        with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            ends = saved["ends"][:-1]
            parts = zip(np.split(saved["indices"], ends), np.split(saved["values"], ends), strict=True)
            return cls(saved["dense"], saved["context"], [SparseVector(*part) for part in parts])


class Query(NamedTuple):
    """A query's unit vector [dimension], or its terms, or both, which are then fused."""

    dense: NDArray[np.float32] | None
    sparse: SparseVector | None


Place = tuple[str, int]  # a namespace, and a row of its vectors


class Hits(NamedTuple):
    """What a search found: what each place is ranked by, best first, and its cosine, or its sparse score."""

    ranking: dict[Place, float]
    scores: dict[Place, float]


def embed_chunks(
    embedder: Embedder,
    contents: Sequence[Sequence[str]],
    *,
    words_only: bool = False,
    dense: NDArray[np.float32] | None = None,
    salt: str = "",
) -> ChunkVectors:
    """Return the vectors of the chunks of all `contents`, one content after another. Neighbours are of one content.

    `dense` are the chunks' unit vectors, if they are known. `salt` is the embedder's.
    """
    texts = [text for content in contents for text in content]
    # Each content's length norm is its own, so that kept vectors are those that a request would make.
    bm25 = [] if embedder.has_sparse else [vector for content in contents for vector in bm25_passages(content)]
    if words_only and not embedder.has_sparse:
        return ChunkVectors(None, None, bm25)
    dense = embedder.embed(texts, salt) if dense is None else dense
    context, first = [], 0
    for content in contents:
        context.append(with_neighbours(dense[first : first + len(content)]))
        first += len(content)
    sparse = embedder.sparse(texts, salt) if embedder.has_sparse else bm25
    return ChunkVectors(dense, np.concatenate(context) if context else dense, sparse)


def embed_query(embedder: Embedder, query: str, method: str, salt: str = "") -> Query:
    """Return what `method` ("dense", "sparse" or "hybrid") asks with."""
    dense = None if method == "sparse" else embedder.embed_query(query, salt)
    if method == "dense":
        return Query(dense, None)
    return Query(dense, embedder.sparse([query], salt)[0] if embedder.has_sparse else bm25_query(query))


def with_neighbours(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """v(i) + 0.5·(v(i − 1) + v(i + 1)), for `vectors` [n, dimension].

    Its product with a query's unit vector is the chunk's cosine and half of each neighbour's. As a unit vector it would
    favour chunks that are unlike their neighbours.
    """
    summed = vectors.copy()
    summed[1:] += _NEIGHBOUR * vectors[:-1]
    summed[:-1] += _NEIGHBOUR * vectors[1:]
    return summed
