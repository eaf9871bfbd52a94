"""Files that come in parts: announced, sent piece by piece, and completed or cancelled."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from deployments.files.parts import PartedUpload, UploadNotStored, new_id
from deployments.files.records import FileNotStored
from deployments.files.store import FileStore
from deployments.schemas.uploads import MAX_PARTS, CompleteRequest, PartObject, UploadObject, UploadRequest
from deployments.turns import Turns
from rapid.errors import InvalidRequest

if TYPE_CHECKING:
    from deployments.files.files import LocalFiles

_MOST_OPEN, _MOST_KEPT = 32, 128  # uploads of a tenant: open ones, and those that can still be read
_MOST_WAITING = 256  # of a tenant, to be completed


class Uploads(Protocol):
    """`StoredUploads`, or those of another process. A tenant sees its own uploads alone."""

    async def create(self, tenant: str, body: UploadRequest) -> UploadObject: ...
    async def list_open(self, tenant: str) -> list[UploadObject]: ...
    async def get(self, tenant: str, upload_id: str) -> UploadObject: ...
    async def add_part(self, tenant: str, upload_id: str, data: bytes) -> PartObject: ...
    async def complete(self, tenant: str, upload_id: str, body: CompleteRequest) -> UploadObject: ...
    async def cancel(self, tenant: str, upload_id: str) -> UploadObject: ...


class StoredUploads:
    """Uploads that become files of ``files``, of at most ``max_bytes`` each.

    What an upload announces is taken from its tenant's room until the upload ends. Whatever an upload is asked for, one
    that is absent raises UploadNotStored, and one that has ended can only be read.
    """

    def __init__(self, store: FileStore, files: LocalFiles, max_bytes: float) -> None:
        self._store, self._files, self._max_bytes = store, files, max_bytes
        # A file is in memory as a whole while it is completed.
        self._turns = Turns(1, _MOST_WAITING, in_all=4)

    async def create(self, tenant: str, body: UploadRequest) -> UploadObject:
        """
        Raises:
            InvalidRequest: the file would be too large, or the tenant has no room for it or too many open uploads.
        """
        return _shown(await asyncio.to_thread(self._create, tenant, body))

    async def list_open(self, tenant: str) -> list[UploadObject]:
        """The oldest first."""
        await asyncio.to_thread(self._remove_old)
        uploads = await asyncio.to_thread(self._store.parts.uploads, tenant)
        return [_shown(upload) for upload in uploads if upload.is_open]

    async def get(self, tenant: str, upload_id: str) -> UploadObject:
        """The upload, with its file where that was not deleted meanwhile."""
        await asyncio.to_thread(self._remove_old)
        upload = await asyncio.to_thread(self._store.parts.get, tenant, upload_id)
        try:
            return _shown(upload, await self._files.get(tenant, upload.file_id) if upload.file_id else None)
        except FileNotStored:
            return _shown(upload)

    async def add_part(self, tenant: str, upload_id: str, data: bytes) -> PartObject:
        """
        Raises:
            InvalidRequest: the part is empty, or the upload has as many parts or bytes as it may have.
        """
        part_id = await asyncio.to_thread(self._add_part, tenant, upload_id, data)
        return PartObject(id=part_id, created_at=int(time.time()), upload_id=upload_id)

    async def complete(self, tenant: str, upload_id: str, body: CompleteRequest) -> UploadObject:
        """Makes a file of the parts that ``body`` names. Where that is refused, the upload stays open.

        Raises:
            InvalidRequest: the parts are not there or are not what was announced, or as `LocalFiles.upload`.
        """
        await asyncio.to_thread(self._remove_old)
        await asyncio.to_thread(self._open, tenant, upload_id)
        async with self._turns.turn(tenant):
            with self._claimed(upload_id):
                upload, data = await asyncio.to_thread(self._joined, tenant, upload_id, body)
                how = (upload.filename, upload.purpose, data, upload.expires_after_s, upload_id)
                with _naming("part_ids"):
                    file = await self._files.upload(tenant, *how)
                ended = replace(upload, status="completed", file_id=file["id"])
                await asyncio.to_thread(self._end, tenant, ended)
        return _shown(ended, file)

    async def cancel(self, tenant: str, upload_id: str) -> UploadObject:
        return _shown(await asyncio.to_thread(self._cancel, tenant, upload_id))

    def _create(self, tenant: str, body: UploadRequest) -> PartedUpload:
        self._remove_old()
        if body.bytes > self._max_bytes:
            limit = f"a file that comes in parts may have {self._max_bytes / 1e6:g} MB"
            raise InvalidRequest(limit, param="bytes", code="request_too_large", status=413)
        expires_after_s = body.expires_after.seconds if body.expires_after else None
        upload = PartedUpload(new_id(), body.bytes, body.filename, body.purpose, expires_after_s)
        with self._store.locked():  # also while the room is looked at: uploads at once must not have the same room
            known = self._store.parts.uploads(tenant)
            if sum(other.is_open for other in known) >= _MOST_OPEN:
                message = f"you may have {_MOST_OPEN} open uploads: complete or cancel some first"
                raise InvalidRequest(message, code="storage_limit_exceeded", status=413)
            with _naming("bytes"):
                self._store.check_room(tenant, body.bytes)
            ended = [other for other in known if not other.is_open]
            for other in ended[: max(0, len(known) + 1 - _MOST_KEPT)]:
                self._store.parts.remove(tenant, other.id)
            self._store.parts.put(tenant, upload)
        return upload

    def _add_part(self, tenant: str, upload_id: str, data: bytes) -> str:
        self._remove_old()
        if not data:
            raise InvalidRequest("the part is empty", param="data")
        self._open(tenant, upload_id)
        try:
            # The lock is held while the part is counted, not while it is written.
            with self._store.parts.unfinished(tenant, upload_id, data) as written, self._store.locked():
                upload = self._open(tenant, upload_id)
                sizes = self._store.parts.sizes(tenant, upload_id)
                if sum(sizes.values()) + len(data) > upload.bytes:
                    message = f"with these {len(data)} bytes the parts have more than the {upload.bytes} announced"
                    raise InvalidRequest(message, param="data")
                if len(sizes) >= MAX_PARTS:
                    raise InvalidRequest(f"an upload may have {MAX_PARTS} parts: send larger ones", param="data")
                return self._store.parts.add(written)
        except FileNotFoundError:  # its hour ended meanwhile
            raise UploadNotStored(f"the upload {upload_id!r} is gone", param="upload_id") from None

    def _joined(self, tenant: str, upload_id: str, body: CompleteRequest) -> tuple[PartedUpload, bytes]:
        upload = self._open(tenant, upload_id)
        sizes = self._store.parts.sizes(tenant, upload_id)
        if unknown := [part_id for part_id in body.part_ids if part_id not in sizes]:
            raise InvalidRequest(f"this upload has no part {unknown[0][:64]!r}", param="part_ids")
        if (total := sum(sizes[part_id] for part_id in body.part_ids)) != upload.bytes:
            message = f"the parts have {total} bytes together, and {upload.bytes} were announced"
            raise InvalidRequest(message, param="part_ids")
        data = self._store.parts.joined(tenant, upload_id, body.part_ids)
        if body.md5 is not None and hashlib.md5(data, usedforsecurity=False).hexdigest() != body.md5.lower():
            raise InvalidRequest("the parts in this order have another MD5", param="md5")
        return upload, data

    def _cancel(self, tenant: str, upload_id: str) -> PartedUpload:
        self._remove_old()
        self._open(tenant, upload_id)
        with self._claimed(upload_id):
            ended = replace(self._open(tenant, upload_id), status="cancelled")
            self._end(tenant, ended)
        return ended

    def _end(self, tenant: str, ended: PartedUpload) -> None:
        with self._store.locked():
            self._store.parts.put(tenant, ended)

    def _open(self, tenant: str, upload_id: str) -> PartedUpload:
        """Raises InvalidRequest where the upload has ended."""
        upload = self._store.parts.get(tenant, upload_id)
        if not upload.is_open:
            raise InvalidRequest(f"this upload is {upload.status}: begin another", param="upload_id")
        return upload

    @contextmanager
    def _claimed(self, upload_id: str) -> Iterator[None]:
        """Only one request ends an upload; one at the same time is refused (409, with which clients try again)."""
        with self._store.claimed(upload_id) as is_ours:
            if not is_ours:
                message = "another request completes or cancels this upload"
                raise InvalidRequest(message, param="upload_id", code="upload_busy", status=409)
            yield

    def _remove_old(self) -> None:
        """Removes what nobody finds any more, whoever's it is, but for what is being completed."""
        for tenant, upload_id in self._store.parts.over():
            with self._store.claimed(upload_id) as is_ours:
                if is_ours:
                    self._store.parts.remove(tenant, upload_id)


@contextmanager
def _naming(param: str) -> Iterator[None]:
    """Errors about a file name the field of the request that stands for it here."""
    try:
        yield
    except InvalidRequest as error:
        if error.param == "file":
            error.param = param
        raise


def _shown(upload: PartedUpload, file: dict[str, Any] | None = None) -> UploadObject:
    return UploadObject(
        id=upload.id,
        bytes=upload.bytes,
        created_at=upload.created_at,
        expires_at=upload.expires_at,
        filename=upload.filename,
        purpose=upload.purpose,
        status=upload.status,
        file=file,
    )
