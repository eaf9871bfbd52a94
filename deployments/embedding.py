"""Texts for the retriever's own models, in batches: one client's thousand texts stand before no other's one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from deployments.files.indexing import IndexingBackend
from deployments.turns import Turns
from retrieval import TextLengths

_BATCH_CHARACTERS = 8192  # of the texts in one call, about; each call has to come back within seconds
_BATCH_TEXTS = 32


class TextModels:
    """The embedder and the reranker behind ``backend``; each client has one batch under way.

    What was computed for a client is found again by clients with the same salt (``salt_of``).
    """

    def __init__(self, backend: IndexingBackend, max_waiting: int, salt_of: Callable[[str], str]) -> None:
        self._backend, self._turns, self._salt_of = backend, Turns(1, max_waiting), salt_of

    async def lengths(self, texts: list[str], client: str) -> TextLengths:
        """(how many tokens the models read, how many each text has)."""
        async with self._turns.turn(client):
            return await self._backend.text_lengths(texts, client)

    async def embed(self, texts: list[str], client: str) -> NDArray[np.float32]:
        """A unit vector for each text: [len(texts), dimension]."""
        rows = []
        for batch in _batches(texts):
            async with self._turns.turn(client):
                rows.append(await self._backend.embed(batch, self._salt_of(client), client))
        return np.concatenate(rows)

    async def rerank(self, query: str, texts: list[str], client: str) -> list[float]:
        """How well each text answers ``query``; higher is better."""
        scores: list[float] = []
        for batch in _batches(texts):
            async with self._turns.turn(client):
                scores += await self._backend.rerank(query, batch, self._salt_of(client), client)
        return scores


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        if batch and (len(batch) == _BATCH_TEXTS or sum(map(len, batch)) + len(text) > _BATCH_CHARACTERS):
            yield batch
            batch = []
        batch.append(text)
    yield batch
