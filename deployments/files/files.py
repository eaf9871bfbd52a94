"""Files that chats refer to: uploaded, listed, read ahead, and deleted with all that was made of them."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Protocol

from deployments.config import AppConfig
from deployments.datastores import Datastores
from deployments.files.attachments import Attachments, extract_text
from deployments.files.indexing import FileIndexer, IndexingBackend
from deployments.files.records import BATCH, BATCH_OUTPUT, PURPOSES, Content, FileNotStored, Upload, name_of
from deployments.files.store import FileStore
from deployments.files.uploads import StoredUploads
from deployments.turns import FairPool
from rapid.engine.messages import SequenceRequest
from rapid.errors import ContextLengthExceeded, InvalidRequest
from rapid.text.encoding import count
from rapid.text.prompts import Message, check_length, read_chat
from retrieval import VECTORS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Files(Protocol):
    """`LocalFiles`, or those of another process.

    A tenant sees its own files alone: a file that is absent, or another tenant's, raises FileNotStored.
    """

    async def upload(
        self, tenant: str, filename: str, purpose: str, data: bytes, expires_after_s: int | None = None
    ) -> dict[str, Any]: ...
    async def list_files(self, tenant: str) -> list[dict[str, Any]]: ...
    async def get(self, tenant: str, file_id: str) -> dict[str, Any]: ...
    async def content(self, tenant: str, file_id: str) -> tuple[str, bytes]: ...
    async def delete(self, tenant: str, file_id: str) -> None: ...
    async def warm(self, tenant: str, file_id: str) -> dict[str, Any]: ...


class LocalFiles:
    """The files in the configured folder, over engines and a retriever that ``backend`` reaches.

    Attributes:
        attachments: the same files as parts of a chat.
        uploads: those that come in parts.
    """

    def __init__(
        self,
        config: AppConfig,
        backend: IndexingBackend,
        tokenizer: PreTrainedTokenizerBase,
        readers: FairPool,
        datastores: Datastores,
    ) -> None:
        self._config, self._backend, self._tokenizer, self._readers = config, backend, tokenizer, readers
        self._store = FileStore(config.files.path, config.files.max_stored_mb * 1e6, config.files.max_files)
        self._removing: asyncio.Task[None] | None = None
        chunk_tokens = config.retriever.options.chunk_tokens
        made_with = f"{config.retriever.embedder}, {chunk_tokens} tokens of {config.target.model}, {VECTORS}"
        self._indexer = FileIndexer(backend, self._store, datastores, chunk_tokens=chunk_tokens, made_with=made_with)
        self.attachments = Attachments(config, self._store, self._indexer, backend, tokenizer, readers, datastores)
        self.uploads = StoredUploads(self._store, self, config.files.max_upload_mb * 1e6)

    async def upload(
        self,
        tenant: str,
        filename: str,
        purpose: str,
        data: bytes,
        expires_after_s: int | None = None,
        upload_id: str | None = None,
    ) -> dict[str, Any]:
        """Reads a file and starts to embed it. Bytes that were read before are not read again.

        ``expires_after_s`` later nobody can read it any more; the configuration may say that this is sooner. A file
        that came in parts has the room of ``upload_id``.

        Raises:
            InvalidRequest: the file has no readable text, or the tenant has no room for it.
        """
        self._remove_expired()
        if purpose not in PURPOSES:
            raise InvalidRequest(f"must be one of {', '.join(PURPOSES)}", param="purpose")
        await asyncio.to_thread(self._store.check_room, tenant, len(data), upload_id)
        if purpose == BATCH:
            content = await asyncio.to_thread(self._unread, data, tenant)
            return await self._put(tenant, filename, purpose, data, "", content, expires_after_s, upload_id)
        salt = self._config.salt_of(tenant)
        name = await asyncio.to_thread(name_of, data, salt)
        try:
            text, known = await asyncio.to_thread(self._store.text, name), self._store.content(name)
            content = Content(known.media_type, known.text_sha256, known.tokens, salt=salt)  # its vectors may be going
        except FileNotStored:
            timeout_s = self._config.files.read_timeout_s
            text, media_type = await extract_text(data, filename, tenant, timeout_s=timeout_s, param="file")
            content = await self._readers.run(tenant, self._describe, text, media_type, salt)
        self._indexer.retry(name)
        return await self._put(tenant, filename, purpose, data, text, content, expires_after_s, upload_id)

    async def add_output(self, tenant: str, filename: str, data: bytes, expires_after_s: int | None) -> str:
        """Stores what a batch has answered, and returns the file's id. Its room was looked at answer by answer."""
        content = await asyncio.to_thread(self._unread, data, tenant)
        stored = await self._put(tenant, filename, BATCH_OUTPUT, data, "", content, expires_after_s)
        return str(stored["id"])

    async def check_room(self, tenant: str, num_bytes: int) -> None:
        """`FileStore.check_room`."""
        await asyncio.to_thread(self._store.check_room, tenant, num_bytes)

    async def list_files(self, tenant: str) -> list[dict[str, Any]]:
        """OpenAI's file objects, the oldest first."""
        self._remove_expired()
        return [self._object(*stored) for stored in await asyncio.to_thread(self._stored, tenant)]

    async def get(self, tenant: str, file_id: str) -> dict[str, Any]:
        """OpenAI's file object."""
        self._remove_expired()
        upload = self._store.upload(tenant, file_id)
        return self._object(upload, self._store.content(upload.content))

    async def content(self, tenant: str, file_id: str) -> tuple[str, bytes]:
        """(filename, the bytes as the client sent them)."""
        upload = self._store.readable(tenant, file_id)
        return upload.filename, await asyncio.to_thread(self._store.original, upload.content)

    async def delete(self, tenant: str, file_id: str) -> None:
        """Removes the file and, where no other file has its text, the text, its vectors, its keys and values, and its
        place in a datastore, with the answers about it.

        A deletion that failed can be repeated until everything is gone.

        Raises:
            RetrievalFailed: the vectors cannot be reached.
        """
        name = await asyncio.to_thread(self._store.retire, tenant, file_id)
        with suppress(FileNotStored):  # of the text: an earlier attempt got this far
            text = await asyncio.to_thread(self._store.text, name)
            async with self._indexer.claimed(self._store.content(name).text_sha256):
                vectors = await asyncio.to_thread(self._store.release, name)
                if vectors is not None:
                    await self.attachments.forget(text, tenant)
                if vectors:
                    await self._backend.delete(vectors)
        with suppress(FileNotStored):  # of the record: another request deleted the same file
            await asyncio.to_thread(self._store.remove, tenant, file_id)

    async def warm(self, tenant: str, file_id: str) -> dict[str, Any]:
        """Has the target read what all chats share whose first message begins with the file.

        Raises:
            ContextLengthExceeded: the file does not fit the target's window.
        """
        upload = self._store.readable(tenant, file_id)
        upload.check_is_read("file_id")
        name = upload.content
        text = await asyncio.to_thread(self._store.text, name)
        window = self._backend.info("target").window
        prompt = await self._readers.run(tenant, self._shared_prefix, text, window)
        if len(prompt) >= window:
            raise ContextLengthExceeded(prompt_tokens=len(prompt), max_tokens=1, window=window, param="file_id")
        salt = self._config.salt_of(tenant)
        try:
            async with self._backend.lease(
                "target", SequenceRequest(prompt, 1, self._config.sampling, salt=salt)
            ) as lease:
                prefilled = await lease.prefill()
        finally:
            await self.attachments.forget_deleted({name: text}, tenant)
        return {
            "id": file_id,
            "object": "file.warmed",
            "prompt_tokens": len(prompt),
            "cached_tokens": prefilled.cached_tokens,
            "elapsed_ms": round(prefilled.elapsed_ms, 2),
        }

    def _remove_expired(self) -> None:
        """Starts to delete what has expired, whoever's it is. What fails is tried again by a later request."""
        if self._removing is None or self._removing.done():
            self._removing = asyncio.create_task(self._delete_expired())

    async def _delete_expired(self) -> None:
        for tenant, file_id in await asyncio.to_thread(self._store.expired):
            try:
                await self.delete(tenant, file_id)
            except Exception as error:
                logger.warning("an expired file was not deleted", exc_info=error)

    def _stored(self, tenant: str) -> list[tuple[Upload, Content]]:
        """The tenant's files, without those that are deleted meanwhile."""
        stored = []
        for upload in self._store.uploads(tenant):
            with suppress(FileNotStored):
                stored.append((upload, self._store.content(upload.content)))
        return stored

    async def _put(
        self,
        tenant: str,
        filename: str,
        purpose: str,
        data: bytes,
        text: str,
        content: Content,
        expires_after_s: int | None,
        upload_id: str | None = None,
    ) -> dict[str, Any]:
        expires_after_s = min(filter(None, (expires_after_s, self._config.files.expire_after_s)), default=None)
        how = (tenant, filename, purpose, data, text, content, expires_after_s, upload_id)
        upload = await asyncio.to_thread(self._store.put, *how)
        return self._object(upload, self._store.content(upload.content))

    def _unread(self, data: bytes, tenant: str) -> Content:
        """The content of ``data`` that nothing is read from: another than that of the same bytes as a document."""
        salt = self._config.salt_of(tenant) + BATCH
        return Content("application/jsonl", name_of(data, salt), tokens=0, salt=salt, is_read=False)

    def _describe(self, text: str, media_type: str, salt: str) -> Content:
        num_tokens = count(self._tokenizer, text)
        return Content(media_type, name_of(text.encode(), salt), num_tokens, salt=salt)

    def _shared_prefix(self, text: str, window: int) -> list[int]:
        """The tokens that the prompts of two chats about ``text`` begin with, whatever the chat template adds.

        Raises:
            ContextLengthExceeded: they are far more than ``window``.
        """
        check_length(self._tokenizer, text, window, "file_id")
        special = self._config.special_tokens_in_text
        chats = [[Message("user", f"{text}\n\n{question}")] for question in ("Why?", "?")]
        prompts = (read_chat(chat, self._tokenizer, special_tokens=special).tokens for chat in chats)
        return [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*prompts, strict=False))]

    def _object(self, upload: Upload, content: Content) -> dict[str, Any]:
        """OpenAI's file object with a `rapid` object more. Starts the embedding where it is missing."""
        self._indexer.ensure(upload.content, content)
        is_done = self._indexer.is_done(content)
        error = None if is_done else self._indexer.error(upload.content)
        if upload.is_going:
            error = "it is being deleted; if that failed, delete it again"
        return {
            "id": upload.id,
            "object": "file",
            "bytes": upload.bytes,
            "created_at": upload.created_at,
            "expires_at": upload.expires_at,
            "filename": upload.filename,
            "purpose": upload.purpose,
            "status": "error" if error else "processed" if is_done else "processing",
            "status_details": error,
            "rapid": {
                "media_type": content.media_type,
                "tokens": content.tokens,
                "chunks": content.chunks,
                "progress": 1.0 if is_done else round(content.embedded / max(1, content.chunks), 3),
            },
        }
