"""Find the parts of a long context that matter to a query.

    embedder = load_embedder("BAAI/bge-m3")
    retriever = Retriever(embedder, ChunkStore(dimension=embedder.dimension), tokenizer)
    retriever.retrieve(contents, query, RetrievalOptions()).chunks

Contents go in as the chat has them, and the chunks worth keeping come back in document order. One call chunks, embeds,
stores, searches and deletes. The package knows nothing of chats, models that generate, or clusters; its results are
plain data that can be pickled. Failures outside the caller's code are RetrievalError.

`ChunkStore` is in `retrieval.store`, which loads Qdrant's client; who only names options need not wait for that.
"""

from retrieval.chunking import Chunk, Tokenizer, split
from retrieval.embedding import Embedder, load_embedder
from retrieval.errors import RetrievalError
from retrieval.retriever import IndexProgress, Retrieval, RetrievalOptions, RetrievedChunk, Retriever

__all__ = [
    "Chunk",
    "Embedder",
    "IndexProgress",
    "Retrieval",
    "RetrievalError",
    "RetrievalOptions",
    "RetrievedChunk",
    "Retriever",
    "Tokenizer",
    "load_embedder",
    "split",
]
