"""Find the parts of a long context that matter to a query."""

from retrieval.chunking import Chunk, Tokenizer, split
from retrieval.embedding import Embedder, load_embedder
from retrieval.errors import RetrievalError

__all__ = [
    "Chunk",
    "Embedder",
    "RetrievalError",
    "Tokenizer",
    "load_embedder",
    "split",
]
