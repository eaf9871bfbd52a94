"""Files that chats refer to: read and embedded once for each content, and what stands in a prompt in their place."""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from itertools import takewhile
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from deployments.config import AppConfig
from deployments.files.extraction import Unreadable, extract
from deployments.files.store import Content, FileNotStored, FileStore, Upload
from deployments.schemas.completions import ChatRequest, Completion
from deployments.schemas.messages import ChatMessage, DocumentText, FilePart
from rapid.backend.protocol import Backend
from rapid.engine.sequence import SequenceRequest
from rapid.errors import ContextLengthExceeded, InvalidRequest, RapidError, RetrievalFailed
from rapid.text.prompts import Message, read_chat
from retrieval import IndexProgress

logger = logging.getLogger(__name__)

PURPOSES = ("user_data", "assistants")
_CLAIM_POLL_S = 0.02


class IndexingBackend(Backend, Protocol):
    """A backend whose retriever keeps documents' vectors."""

    def keep(self, text: str, chunk_tokens: int) -> AsyncIterator[IndexProgress]:
        """Embeds ``text`` for later requests, and tells how far it is.

        Raises:
            RetrievalFailed: the retriever or its store cannot be had.
        """
        ...

    async def delete(self, vectors: str) -> None:
        """Removes what was kept. Raises RetrievalFailed likewise."""
        ...


class Files(Protocol):
    """`LocalFiles`, or those of another process. A file is nobody's but its tenant's: others get FileNotStored."""

    async def upload(self, tenant: str, filename: str, purpose: str, data: bytes) -> dict[str, Any]: ...
    async def listed(self, tenant: str) -> list[dict[str, Any]]: ...
    async def get(self, tenant: str, file_id: str) -> dict[str, Any]: ...
    async def content(self, tenant: str, file_id: str) -> tuple[str, bytes]: ...
    async def delete(self, tenant: str, file_id: str) -> None: ...
    async def warm(self, tenant: str, file_id: str) -> dict[str, Any]: ...


class LocalFiles:
    """The files in the configured folder, over engines and a retriever that ``backend`` reaches.

    What is written here is whole at any moment, so it may die anywhere: whoever next asks about a file whose vectors
    are not finished sees to it that they will be.
    """

    def __init__(self, config: AppConfig, backend: IndexingBackend, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._backend, self._tokenizer = config, backend, tokenizer
        self._store = FileStore(config.files.path)
        self._chunk_tokens = config.retriever.options.chunk_tokens
        self._made_with = f"{config.retriever.embedder}, {self._chunk_tokens} tokens of {config.target.model}"
        self._embedding: dict[str, asyncio.Task[None]] = {}  # by content
        self._failed: dict[str, str] = {}  # and why; here, since a full disk is one of the reasons

    async def upload(self, tenant: str, filename: str, purpose: str, data: bytes) -> dict[str, Any]:
        """Reads a file and begins to embed it; bytes that were read before are not read again.

        Raises:
            InvalidRequest: there is no text in it, or no room for it.
        """
        if purpose not in PURPOSES:
            raise InvalidRequest(f"files are read in chats here: one of {', '.join(PURPOSES)}", param="purpose")
        stored = await asyncio.to_thread(self._store.uploads, tenant)
        limit = self._config.files.max_stored_mb
        if sum(upload.bytes for upload in stored) + len(data) > limit * 1e6:
            message = f"your files may take {limit:g} MB together: delete some first (DELETE /v1/files/{{id}})"
            raise InvalidRequest(message, code="storage_limit_exceeded", status=413, param="file")
        name = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        try:
            text, known = await asyncio.to_thread(self._store.text, name), self._store.content(name)
            content = Content(known.media_type, known.text_sha256, known.tokens)  # what is said of vectors may be old
        except FileNotStored:
            text, kind = await self._extract(data, filename, param="file")
            content = await asyncio.to_thread(self._describe, text, kind)
        upload = await asyncio.to_thread(self._store.put, tenant, filename, purpose, data, text, content)
        self._failed.pop(name, None)
        return self._object(upload, self._store.content(name))

    async def listed(self, tenant: str) -> list[dict[str, Any]]:
        """OpenAI's file objects, the oldest first."""
        return [self._object(*known) for known in await asyncio.to_thread(self._known, tenant)]

    async def get(self, tenant: str, file_id: str) -> dict[str, Any]:
        upload = self._store.upload(tenant, file_id)
        return self._object(upload, self._store.content(upload.content))

    async def content(self, tenant: str, file_id: str) -> tuple[str, bytes]:
        """(filename, the bytes as they came)."""
        upload = self._readable(tenant, file_id)
        return upload.filename, await asyncio.to_thread(self._store.original, upload.content)

    async def delete(self, tenant: str, file_id: str) -> None:
        """Removes the file and, where no other has its text, the text, its vectors, and its keys and values.

        One that failed can be done again, until everything is gone.

        Raises:
            RetrievalFailed: the vectors cannot be reached.
        """
        name = await asyncio.to_thread(self._store.retire, tenant, file_id)
        with suppress(FileNotStored):  # of the text: the rest had been done when an earlier attempt broke off
            text = await asyncio.to_thread(self._store.text, name)
            async with self._claimed(self._store.content(name).text_sha256):
                vectors = await asyncio.to_thread(self._store.release, name)
                if vectors is not None:
                    await self._forget(text)
                if vectors:
                    await self._backend.delete(vectors)
        with suppress(FileNotStored):  # of the record: the same was asked for twice
            await asyncio.to_thread(self._store.remove, tenant, file_id)

    async def warm(self, tenant: str, file_id: str) -> dict[str, Any]:
        """Reads what every chat begins with whose first message begins with the file, so that the engine has it.

        Raises:
            ContextLengthExceeded: it does not fit the target's window.
        """
        name = self._readable(tenant, file_id).content
        text = await asyncio.to_thread(self._store.text, name)
        prompt = await asyncio.to_thread(self._beginning, text)
        window = self._backend.info("target").window
        if len(prompt) >= window:
            raise ContextLengthExceeded(prompt_tokens=len(prompt), max_tokens=1, window=window, param="file_id")
        try:
            async with self._backend.lease("target", SequenceRequest(prompt, 1, self._config.sampling)) as lease:
                prefilled = await lease.prefill()
        finally:
            await self._forget_deleted({name: text})
        return {
            "id": file_id,
            "object": "file.warmed",
            "prompt_tokens": len(prompt),
            "cached_tokens": prefilled.cached_tokens,
            "elapsed_ms": round(prefilled.elapsed_ms, 2),
        }

    @asynccontextmanager
    async def read(self, completion: Completion, tenant: str) -> AsyncIterator[Completion]:
        """``completion`` with the text of its file parts in their place, for as long as it is being answered.

        Raises:
            FileNotStored, InvalidRequest: ``param`` names the part.
        """
        if not isinstance(completion, ChatRequest) or not completion.has_files:
            yield completion
            return
        used: dict[str, str] = {}  # content to text
        messages = [await self._read_message(i, message, tenant, used) for i, message in enumerate(completion.messages)]
        try:
            yield completion.model_copy(update={"messages": messages})
        finally:
            await self._forget_deleted(used)

    async def _read_message(self, i: int, message: ChatMessage, tenant: str, used: dict[str, str]) -> ChatMessage:
        if not isinstance(message.content, list):
            return message
        parts: list[Any] = []
        for j, part in enumerate(message.content):
            if isinstance(part, FilePart):
                where = f"messages.{i}.content.{j}.file"
                if message.role not in ("user", "system", "developer"):
                    raise InvalidRequest(f"a {message.role} message cannot hold a file", param=where)
                part = DocumentText(type="text", text=await self._text(part, tenant, where, used))
            parts.append(part)
        return message.model_copy(update={"content": parts})

    async def _text(self, part: FilePart, tenant: str, where: str, used: dict[str, str]) -> str:
        if part.file.file_id is None:
            data = await asyncio.to_thread(part.file.data, f"{where}.file_data")
            return (await self._extract(data, part.file.filename or "", param=f"{where}.file_data"))[0]
        try:
            name = self._readable(tenant, part.file.file_id).content
            text = used[name] = await asyncio.to_thread(self._store.text, name)
        except RapidError as error:
            error.param = f"{where}.file_id"
            raise
        self._see_to_embedding(name, self._store.content(name))
        return text

    def _readable(self, tenant: str, file_id: str) -> Upload:
        upload = self._store.upload(tenant, file_id)
        if upload.is_going:
            raise FileNotStored(f"the file {file_id!r} is being deleted", param="file_id")
        return upload

    def _known(self, tenant: str) -> list[tuple[Upload, Content]]:
        """The tenant's files, less those that are deleted meanwhile."""
        known = []
        for upload in self._store.uploads(tenant):
            with suppress(FileNotStored):
                known.append((upload, self._store.content(upload.content)))
        return known

    async def _extract(self, data: bytes, filename: str, *, param: str) -> tuple[str, str]:
        try:
            return await extract(data, filename=filename, timeout_s=self._config.files.read_timeout_s)
        except Unreadable as error:
            code = "unsupported_file" if error.status == 415 else "unreadable_file"
            raise InvalidRequest(error.message, code=code, status=error.status, param=param) from error

    def _describe(self, text: str, kind: str) -> Content:
        return Content(kind, hashlib.sha256(text.encode()).hexdigest(), len(self._tokens(text)))

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _beginning(self, text: str) -> list[int]:
        """What the prompts of two chats about ``text`` have in common, however the template puts them."""
        chats = [[Message("user", f"{text}\n\n{question}")] for question in ("Why?", "?")]
        prompts = zip(*(read_chat(chat, self._tokenizer).tokens for chat in chats), strict=False)
        return [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], prompts)]

    async def _forget_deleted(self, used: dict[str, str]) -> None:
        """What was deleted while a request used it (content to text) has been read by that request since."""
        for text in [text for name, text in used.items() if not self._store.has(name)]:
            await self._forget(text)

    async def _forget(self, text: str) -> None:
        await self._backend.forget(await asyncio.to_thread(self._tokens, text))

    def _object(self, upload: Upload, content: Content) -> dict[str, Any]:
        self._see_to_embedding(upload.content, content)
        is_done = content.is_embedded(self._made_with)
        error = None if is_done else self._failed.get(upload.content)
        if upload.is_going:
            error = "it is being deleted; if that failed, delete it again"
        return {
            "id": upload.id,
            "object": "file",
            "bytes": upload.bytes,
            "created_at": upload.created_at,
            "expires_at": None,
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

    def _see_to_embedding(self, name: str, content: Content) -> None:
        is_wanted = not content.is_going and not content.is_embedded(self._made_with)
        if is_wanted and name not in self._embedding and name not in self._failed:
            task = self._embedding[name] = asyncio.create_task(self._embed(name))
            task.add_done_callback(lambda _: self._embedding.pop(name))

    async def _embed(self, name: str) -> None:
        """Keeps the vectors of a content, unless somebody is at its text; chats go on without them meanwhile."""
        try:
            with self._store.claimed(self._store.content(name).text_sha256) as is_ours:
                if not is_ours:
                    return
                content, text = self._store.content(name), await asyncio.to_thread(self._store.text, name)
                outdated = content.vectors if content.made_with != self._made_with else ""
                async for kept in self._backend.keep(text, self._chunk_tokens):
                    content = replace(
                        content,
                        made_with=self._made_with,
                        vectors=kept.namespace,
                        chunks=kept.num_chunks,
                        embedded=kept.num_embedded,
                    )
                    await asyncio.to_thread(self._store.update, name, content)
                if outdated and outdated != content.vectors:
                    await self._backend.delete(outdated)
        except FileNotStored:  # any more; whoever deletes it waits for the claim, and then drops the vectors
            return
        except Exception as error:
            logger.warning("a file was not embedded", exc_info=error)
            self._failed[name] = error.message if isinstance(error, RetrievalFailed) else "internal error"

    @asynccontextmanager
    async def _claimed(self, text_sha256: str) -> AsyncIterator[None]:
        """Waits for whoever works on that text's vectors, who finds out after a batch at most that it is going."""
        while True:
            with self._store.claimed(text_sha256) as is_ours:
                if is_ours:
                    yield
                    return
            await asyncio.sleep(_CLAIM_POLL_S)
