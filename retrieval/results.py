"""What the retriever's calls return: plain data that can be pickled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class RetrievedChunk:
    """A kept chunk: `text` is `contents[content][start:end]`, of `num_tokens` tokens when tokenised alone.

    `position` counts the chunks of all contents in order, from 0 up to `Retrieval.num_chunks`. `score` is the cosine
    similarity to the query; of a sparse search, its sparse score.
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

    `context_tokens` is the length of the whole context, `retrieved_tokens` that of the kept chunks. If no chunk reaches
    the threshold, `reaches_threshold` is False, and the chunks are the best there are. `confidence`, 0 to 1, is how
    probable it is that what the query needs is among them (`retrieval.calibration`), if half of all queries are about
    something else than the context.
    """

    chunks: tuple[RetrievedChunk, ...]
    context_tokens: int
    retrieved_tokens: int
    num_chunks: int
    elapsed_ms: float
    reaches_threshold: bool
    confidence: float


class Search(NamedTuple):
    """A ranking of chunks by position, best first, and the scores that it and its confidence rest on."""

    order: list[int]
    scores: dict[int, float]


@dataclass(frozen=True)
class IndexProgress:
    """`num_embedded` of a text's `num_chunks` chunks have vectors, in the store's namespace `namespace`."""

    namespace: str
    num_embedded: int
    num_chunks: int


class TextLengths(NamedTuple):
    """Tokens of each text, `most` of which the embedder reads; the reranker, if any, `most_with_query` of both."""

    lengths: list[int]
    most: int
    most_with_query: int | None
