"""The one exception this package raises for things outside the caller's code: models and servers."""

from __future__ import annotations


class RetrievalError(Exception):
    """A model or a vector store cannot be used. The message says what is wrong, where, and what to do."""
