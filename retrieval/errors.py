"""The one exception that this package raises for causes outside the caller's code: models and servers."""

from __future__ import annotations


class RetrievalError(Exception):
    """A model or a vector store cannot be used. The message names the failure, its place, and a remedy."""


class StoreTimeout(RetrievalError, TimeoutError):
    """The vector store accepts calls and does not answer them, or takes too long for them together."""
