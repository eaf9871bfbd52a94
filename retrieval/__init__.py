"""Find the parts of a long context that matter to a query."""

from retrieval.chunking import Chunk, Tokenizer, split
from retrieval.embedding import Embedder, load_embedder
from retrieval.errors import RetrievalError
from retrieval.store import ChunkStore

__all__ = [
    "Chunk",
    "ChunkStore",
    "Embedder",
    "RetrievalError",
    "Tokenizer",
    "load_embedder",
    "split",
]
