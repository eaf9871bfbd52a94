"""Find the parts of a long context that matter to a query.

    embedder = retrieval.embedding.load_embedder("BAAI/bge-m3")
    retriever = Retriever(embedder, retrieval.store.ChunkStore(dimension=embedder.dimension), tokenizer)
    retriever.retrieve(contents, query, RetrievalOptions()).chunks

Contents go in as the chat has them, and the chunks worth keeping come back in document order. One call chunks, embeds,
stores, searches and deletes. The package knows nothing of chats, models that generate, or clusters; its results are
plain data that can be pickled. Failures outside the caller's code are RetrievalError.

`retrieval.store` and `retrieval.embedding` are imported by name: the first loads Qdrant's client and the second torch,
and a process that only names options needs neither.
"""

from retrieval.chunking import Chunk, Tokenizer, split
from retrieval.errors import RetrievalError
from retrieval.retriever import IndexProgress, Retrieval, RetrievalOptions, RetrievedChunk, Retriever

__all__ = [
    "Chunk",
    "IndexProgress",
    "Retrieval",
    "RetrievalError",
    "RetrievalOptions",
    "RetrievedChunk",
    "Retriever",
    "Tokenizer",
    "split",
]
