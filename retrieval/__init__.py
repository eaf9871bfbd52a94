"""Find the parts of a long context that matter to a query."""

from retrieval.chunking import Chunk, Tokenizer, split
from retrieval.errors import RetrievalError

__all__ = [
    "Chunk",
    "RetrievalError",
    "Tokenizer",
    "split",
]
