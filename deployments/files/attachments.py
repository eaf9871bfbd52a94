"""Attachments of a chat: the text of a file takes the place of the message part that names it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from deployments.config import AppConfig
from deployments.datastores import Datastores
from deployments.files.extraction import Unreadable, extract
from deployments.files.indexing import FileIndexer
from deployments.files.records import name_of
from deployments.files.store import FileStore
from deployments.schemas.body import Body
from deployments.schemas.messages import ChatMessage, DocumentText, FilePart
from deployments.turns import FairPool, Turns
from rapid.backend.protocol import Backend
from rapid.errors import InvalidRequest, RapidError
from rapid.text.encoding import encode_in_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_places = asyncio.Semaphore(2)  # a reader may take a core and 2 GiB
_turns = Turns(1, max_waiting=64)


async def extract_text(data: bytes, filename: str, tenant: str, *, timeout_s: float, param: str) -> tuple[str, str]:
    """(text, media type) of a file. Files of one tenant are read one after another.

    Raises:
        InvalidRequest: the file has no readable text; the error names ``param``.
    """
    try:
        async with _turns.turn(tenant), _places:
            return await extract(data, filename=filename, timeout_s=timeout_s)
    except Unreadable as error:
        code = "unsupported_file" if error.status == 415 else "unreadable_file"
        raise InvalidRequest(error.message, code=code, status=error.status, param=param) from error


def tokens_of(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a file's text, as they stand in the middle of a prompt."""
    return encode_in_pieces(tokenizer, text)


B = TypeVar("B", bound=Body)


class Attached(NamedTuple, Generic[B]):
    """A body with the text of its files, and the names of those texts that are stored (`Content.text_sha256`)."""

    body: B
    texts: frozenset[str] = frozenset()


class Attachments:
    """Reads the file parts of chats, and has engines and datastores forget the texts that are deleted.

    Args:
        readers: the threads that read requests.
    """

    def __init__(
        self,
        config: AppConfig,
        store: FileStore,
        indexer: FileIndexer,
        backend: Backend,
        tokenizer: PreTrainedTokenizerBase,
        readers: FairPool,
        datastores: Datastores,
    ) -> None:
        self._readers, self._datastores = readers, datastores
        self._store, self._indexer, self._backend = store, indexer, backend
        self._config, self._tokenizer = config, tokenizer

    @asynccontextmanager
    async def read(self, body: B, tenant: str) -> AsyncIterator[Attached[B]]:
        """``body`` with the text of its messages' files in their place, until the block ends.

        Raises:
            FileNotStored, InvalidRequest: ``param`` names the part.
        """
        sent: list[ChatMessage] = getattr(body, "messages", None) or []
        if not any(message.has_files for message in sent):
            yield Attached(body)
            return
        used: dict[str, str] = {}  # content to text
        messages = [await self._read_message(i, message, tenant, used) for i, message in enumerate(sent)]
        try:
            texts = {self._name(text, tenant) for text in used.values()}
            yield Attached(body.model_copy(update={"messages": messages}), frozenset(texts))
        finally:
            await self.forget_deleted(used, tenant)

    async def forget(self, text: str, tenant: str) -> None:
        """Drops ``text`` from every engine's keys and values, and from the datastores.

        What other tenants read is dropped too, where it is shared.
        """
        await asyncio.to_thread(self._datastores.remove, self._config.salt_of(tenant), self._name(text, tenant))
        tokens = await self._readers.run(tenant, tokens_of, text, self._tokenizer)
        await self._backend.forget(tokens, self._config.salt_of(tenant))

    async def forget_deleted(self, used: dict[str, str], tenant: str) -> None:
        """Forgets the texts that were deleted while a request used them (content to text) and engines read them."""
        for text in [text for name, text in used.items() if not self._store.has(name)]:
            await self.forget(text, tenant)

    def _name(self, text: str, tenant: str) -> str:
        """`Content.text_sha256` of a file with this text."""
        return name_of(text.encode(), self._config.salt_of(tenant))

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
        """The text of an inline or a stored file; a stored one is noted in ``used`` and indexed."""
        if part.file.file_id is None:
            param = f"{where}.file_data"
            data = await asyncio.to_thread(part.file.data, param)
            text, _ = await extract_text(
                data, part.file.filename or "", tenant, timeout_s=self._config.files.read_timeout_s, param=param
            )
            return text
        try:
            upload = self._store.readable(tenant, part.file.file_id)
            upload.check_is_read(f"{where}.file_id")
            name = upload.content
            text = used[name] = await asyncio.to_thread(self._store.text, name)
        except RapidError as error:
            error.param = f"{where}.file_id"
            raise
        self._indexer.ensure(name, self._store.content(name))
        return text
