"""Embeds the text of stored files in the background, once for each text, so that chats find its chunks indexed.

Where answers draft from files, it also adds the text to their datastore.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from deployments.datastores import Datastores
from deployments.files.records import Content, FileNotStored
from deployments.files.store import FileStore
from rapid.backend.protocol import Backend
from rapid.errors import ModelFileError, RetrievalFailed
from retrieval import IndexProgress, TextLengths

T = TypeVar("T")
logger = logging.getLogger(__name__)

_CLAIM_POLL_S = 0.02


class IndexingBackend(Backend, Protocol):
    """A backend whose retriever keeps the vectors of documents between requests."""

    def keep(self, text: str, chunk_tokens: int, tenant: str = "") -> AsyncIterator[IndexProgress]:
        """Embeds ``text`` for later requests of ``tenant`` and yields the progress.

        Raises:
            RetrievalFailed: the retriever or its store is gone.
        """
        ...

    async def delete(self, vectors: str) -> None:
        """Removes kept vectors. Raises RetrievalFailed as `keep` does."""
        ...

    async def embed(self, texts: list[str], salt: str = "", client: str = "") -> NDArray[np.float32]:
        """`Embedder.embed`, when it is the turn of ``client``. Raises RetrievalFailed as `keep` does."""
        ...

    async def text_lengths(self, texts: list[str], client: str = "") -> TextLengths:
        """`Retriever.lengths`, in turns as `embed`. Raises RetrievalFailed as `keep` does."""
        ...

    async def rerank(self, query: str, texts: list[str], salt: str = "", client: str = "") -> list[float]:
        """`Retriever.rerank`, in turns as `embed`. Raises RetrievalFailed as `keep` does."""
        ...


class FileIndexer:
    """Embeds the contents of ``store``. Chats go on without the vectors meanwhile.

    Every state on disk is whole, so this process may die at any moment: the next request about a content whose vectors
    are not finished starts the embedding again.

    Args:
        made_with: names the embedder and the chunks; vectors that were made otherwise are replaced.
    """

    def __init__(
        self,
        backend: IndexingBackend,
        store: FileStore,
        datastores: Datastores,
        *,
        chunk_tokens: int,
        made_with: str,
    ) -> None:
        self._backend, self._store, self._datastores = backend, store, datastores
        self._chunk_tokens, self._made_with = chunk_tokens, made_with
        self._running: dict[str, asyncio.Task[None]] = {}  # by content
        self._errors: dict[str, str] = {}  # by content; in memory, since a full disk is one of the reasons

    def ensure(self, name: str, content: Content) -> None:
        """Starts the embedding of a content unless it is done, is under way, has failed, or the content is going."""
        is_everywhere = self.is_done(content) and self._datastores.has_file(content.salt, content.text_sha256)
        is_wanted = content.is_read and not content.is_going and not is_everywhere
        if is_wanted and name not in self._running and name not in self._errors:
            task = self._running[name] = asyncio.create_task(self._embed(name))
            task.add_done_callback(lambda _: self._running.pop(name))

    def is_done(self, content: Content) -> bool:
        return content.is_embedded(self._made_with)

    def error(self, name: str) -> str | None:
        """Why the embedding of a content failed; None where it did not."""
        return self._errors.get(name)

    def retry(self, name: str) -> None:
        """Lets `ensure` start again what has failed."""
        self._errors.pop(name, None)

    @asynccontextmanager
    async def claimed(self, text_sha256: str) -> AsyncIterator[None]:
        """Holds the claim on a text's vectors. An embedding that has it gives it up after its current batch."""
        while True:
            with self._store.claimed(text_sha256) as is_ours:
                if is_ours:
                    yield
                    return
            await asyncio.sleep(_CLAIM_POLL_S)

    async def _embed(self, name: str) -> None:
        """Keeps the vectors of a content, unless another task or process holds the claim on its text."""
        try:
            with self._store.claimed(self._store.content(name).text_sha256) as is_ours:
                if not is_ours:
                    return
                content, text = self._store.content(name), await asyncio.to_thread(self._store.text, name)
                outdated = content.vectors if content.made_with != self._made_with else ""
                async for progress in self._backend.keep(text, self._chunk_tokens, content.salt):
                    content = replace(
                        content,
                        made_with=self._made_with,
                        vectors=progress.namespace,
                        chunks=progress.num_chunks,
                        embedded=progress.num_embedded,
                    )
                    await asyncio.to_thread(self._store.update, name, content)
                if outdated and outdated != content.vectors:
                    await self._backend.delete(outdated)
                if self._store.has(name):  # else its deletion may have looked into the datastores already
                    await asyncio.to_thread(self._datastores.add_file, content.salt, content.text_sha256, text)
        except FileNotStored:  # any more: its deletion waits for the claim, and then removes the vectors
            return
        except Exception as error:
            logger.warning("a file was not embedded", exc_info=error)
            self._errors[name] = (
                error.message if isinstance(error, RetrievalFailed | ModelFileError) else "internal error"
            )


async def in_threads(steps: Iterator[T]) -> AsyncGenerator[T, None]:
    """The items of ``steps``, each computed in a thread."""
    while step := await asyncio.to_thread(lambda: list(islice(steps, 1))):
        yield step[0]
