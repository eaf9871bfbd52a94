"""Find the parts of a long context that matter to a query.

    embedder = retrieval.embedding.load_embedder("BAAI/bge-m3")
    retriever = Retriever(embedder, retrieval.store.ChunkStore(dimension=embedder.dimension), tokenizer)
    retriever.retrieve(contents, query, RetrievalOptions()).chunks

The caller passes the contents of a chat; the relevant chunks come back in document order. One call chunks, embeds,
stores, searches and deletes. The package does not depend on chats, on models that generate, or on clusters; its results
are plain data that can be pickled. Failures outside the caller's code are RetrievalError.

Import `retrieval.store` and `retrieval.embedding` by name: the first loads Qdrant's client and the second torch, and a
process that only names options needs neither.
"""

from retrieval.chunking import Chunk, Tokenizer, split
from retrieval.errors import RetrievalError
from retrieval.options import METHODS, Method, RetrievalOptions, TenantOptions
from retrieval.results import IndexProgress, Retrieval, RetrievedChunk, TextLengths
from retrieval.retriever import Retriever
from retrieval.vectors import VECTORS

__all__ = [
    "METHODS",
    "VECTORS",
    "Chunk",
    "IndexProgress",
    "Method",
    "Retrieval",
    "RetrievalError",
    "RetrievalOptions",
    "RetrievedChunk",
    "Retriever",
    "TenantOptions",
    "TextLengths",
    "Tokenizer",
    "split",
]
