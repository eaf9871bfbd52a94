"""Uploaded files in a folder that several processes may share, and what is known of each content, once per content.

    tenants/<tenant>/<file id>.json  one upload: its name, purpose, and which content it has
    contents/<SHA-256>/original      the bytes as they came; `text` is what was read from them, `state.json` a `Content`
    claims/<SHA-256 of a text>       locked by the process that writes or deletes that text's vectors
    tenants/<tenant>/uploads         files that come in parts (`deployments.files.parts`)
    uses, texts, ending              who has what (`deployments.files.index`)
    lock                             held while a file is added or removed

Every file is written beside its place and renamed, so that no process reads half of it. An upload's record is removed
last, so that a deletion which broke off can be repeated.
"""

import fcntl
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path

from deployments.files.disk import locked, write_whole
from deployments.files.index import Index
from deployments.files.parts import PartStore
from deployments.files.records import BATCH_OUTPUT, Content, FileNotStored, Upload, name_of
from rapid.errors import InvalidRequest

_FILE_ID = re.compile(r"file-[0-9a-f]{32}")


class FileStore:
    """The files under ``folder``, which the first upload creates. An absent file raises FileNotStored.

    One tenant may have ``max_files``, which may take ``max_bytes``.
    """

    def __init__(self, folder: Path, max_bytes: float, max_files: int) -> None:
        self._folder, self._max_bytes, self._max_files = folder, max_bytes, max_files
        self._index, self.parts = Index(folder), PartStore(folder)

    def put(
        self,
        tenant: str,
        filename: str,
        purpose: str,
        data: bytes,
        text: str,
        content: Content,
        expires_after_s: int | None = None,
        upload_id: str | None = None,
    ) -> Upload:
        """Stores a new upload. Where the same bytes are stored already, their `Content` stays as it is.

        A file that came in parts has the room of ``upload_id``.

        Raises:
            InvalidRequest: the tenant has no room for it.
        """
        name, now = name_of(data, content.salt), int(time.time())
        # Names begin with the time, so that they are in the order of the uploads, also within a second.
        file_id, stored = f"file-{time.time_ns():016x}{uuid.uuid4().hex[:16]}", len(data) + len(text.encode())
        expires_at = None if expires_after_s is None else now + expires_after_s
        upload = Upload(file_id, filename, purpose, len(data), now, name, stored=stored, expires_at=expires_at)
        with self.locked():  # also while the room is looked at: uploads at once must not have the same room
            if purpose != BATCH_OUTPUT:  # for whose answers there was room when they came
                self.check_room(tenant, stored, upload_id)
            self._index.add(name, content.text_sha256, file_id)
            try:
                self._put_content(name, data, text, content)
                if expires_at is not None:
                    self._index.ends(expires_at, tenant, file_id)
                _write(self._record(tenant, file_id), asdict(upload))
            except OSError:
                self._index.remove(name, file_id)
                raise
        return upload

    def _put_content(self, name: str, data: bytes, text: str, content: Content) -> None:
        place = self._content(name)
        try:
            self._set(name, replace(self.content(name), is_going=False))
        except FileNotStored:
            made = place.with_name(f".{uuid.uuid4().hex}")
            made.mkdir(parents=True)
            (made / "original").write_bytes(data)
            (made / "text").write_text(text, encoding="utf-8", newline="")
            _write(made / "state.json", asdict(content))
            shutil.rmtree(place, ignore_errors=True)  # the rest of a removal that broke off
            made.rename(place)

    def check_room(self, tenant: str, num_bytes: int, upload_id: str | None = None) -> None:
        """Counts the tenant's files, and what its open uploads but ``upload_id`` have announced.

        Raises:
            InvalidRequest: with a file of ``num_bytes`` more they would be above a limit.
        """
        uploads = self._uploads(tenant)
        announced = [other.bytes for other in self.parts.uploads(tenant) if other.is_open and other.id != upload_id]
        if len(uploads) + len(announced) >= self._max_files:
            message = f"you may have {self._max_files} files: delete some first (DELETE /v1/files/{{id}})"
            raise InvalidRequest(message, code="storage_limit_exceeded", status=413, param="file")
        stored = sum(max(upload.bytes, upload.stored) for upload in uploads) + sum(announced)
        stored += sum(answers.stat().st_size for answers in self._folder.glob(f"tenants/{tenant}/batches/*.answers"))
        if stored + num_bytes > self._max_bytes:
            limit = f"{self._max_bytes / 1e6:g} MB"
            message = f"your files and their text may take {limit}: delete some first (DELETE /v1/files/{{id}})"
            message += f", or cancel uploads that are open: they keep {sum(announced) / 1e6:g} MB" if announced else ""
            raise InvalidRequest(message, code="storage_limit_exceeded", status=413, param="file")

    def uploads(self, tenant: str) -> list[Upload]:
        """The tenant's files, the oldest first."""
        return sorted(self._uploads(tenant), key=lambda upload: (upload.created_at, upload.id))

    def upload(self, tenant: str, file_id: str) -> Upload:
        """One of the tenant's files."""
        found = None
        if _FILE_ID.fullmatch(file_id):  # another string could be a path to any file
            found = _read(self._record(tenant, file_id))
        if found is None:
            raise FileNotStored(f"there is no file {file_id!r}", param="file_id")
        return found

    def readable(self, tenant: str, file_id: str) -> Upload:
        """One of the tenant's files. Raises FileNotStored also for one that is being deleted, or has expired."""
        upload = self.upload(tenant, file_id)
        if upload.is_going or (upload.expires_at is not None and upload.expires_at <= time.time()):
            raise FileNotStored(f"the file {file_id!r} is being deleted, or has expired", param="file_id")
        return upload

    def expired(self) -> list[tuple[str, str]]:
        """(tenant, file id) of all expired files that are still there."""
        return self._index.ended(time.time())

    def retire(self, tenant: str, file_id: str) -> str:
        """Begins the deletion of a file, or repeats it. Returns the file's content; no request reads the file now."""
        with self.locked():
            upload = replace(self.upload(tenant, file_id), is_going=True)
            _write(self._record(tenant, file_id), asdict(upload))
            self._index.retire(upload.content, file_id)
            if not self._index.is_staying(upload.content):
                with suppress(FileNotStored):
                    self._set(upload.content, replace(self.content(upload.content), is_going=True))
        return upload.content

    def release(self, name: str) -> str | None:
        """The namespace of the vectors that no file needs any more; None where a file that stays has the same text.

        The caller holds the claim on that text. The vectors count as deleted from now on: a later upload embeds them
        again even if their deletion fails.
        """
        with self.locked():
            content = self.content(name)
            if not content.is_read:
                return None
            alike = [other for other in self._index.contents_with(content.text_sha256) if self._is_stored(other)]
            for other in (staying := [other for other in alike if self._index.is_staying(other)]):
                if not self.content(other).vectors:  # it shares them, and has not asked for them yet
                    self._set(other, replace(self.content(other), vectors=content.vectors))
            if staying:
                return None
            for other in alike:
                self._set(other, replace(self.content(other), made_with="", embedded=0))
            return content.vectors

    def remove(self, tenant: str, file_id: str) -> None:
        """Ends the deletion of a file. The last file of a content, going or not, takes the bytes and the text along."""
        with self.locked():
            upload = self.upload(tenant, file_id)
            name = upload.content
            if self._index.is_the_last(name, file_id):
                with suppress(FileNotStored):
                    self._index.remove_text(self.content(name).text_sha256, name)
                # Without its state a content counts as absent, wherever this removal breaks off.
                (self._content(name) / "state.json").unlink(missing_ok=True)
                with suppress(FileNotFoundError):
                    shutil.rmtree(self._content(name))
            self._index.remove(name, file_id)
            if upload.expires_at is not None:
                self._index.remove_end(upload.expires_at, tenant, file_id)
            self._record(tenant, file_id).unlink()

    def has(self, content: str) -> bool:
        """Whether a file that is not going has ``content``."""
        try:
            return not self.content(content).is_going
        except FileNotStored:
            return False

    def content(self, name: str) -> Content:
        """What is known of one content."""
        state = json.loads(self._bytes(name, "state.json"))
        return Content(**{field.name: state[field.name] for field in fields(Content) if field.name in state})

    def update(self, name: str, content: Content) -> None:
        """Replaces what is known of a content. Raises FileNotStored where the content is gone or going."""
        with self.locked():
            if not self.has(name):
                raise FileNotStored("the file was deleted")
            self._set(name, content)

    def text(self, name: str) -> str:
        """The text that was read from a content."""
        return self._bytes(name, "text").decode("utf-8")

    def original(self, name: str) -> bytes:
        """The bytes of a content as they came."""
        return self._bytes(name, "original")

    @contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """Claims the vectors of the text with the SHA-256 ``name``, or the end of the upload ``name``.

        Yields whether that succeeded. The system frees the claims of a dead process.
        """
        path = self._folder / "claims" / name
        path.parent.mkdir(exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The previous holder may have removed the file that was locked here.
                is_ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except (BlockingIOError, FileNotFoundError):
                is_ours = False
            try:
                yield is_ours
            finally:
                if is_ours:
                    path.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder's lock for the block."""
        with locked(self._folder):
            if self._index.is_missing:
                self._index.build(
                    ((upload.content, upload.id, upload.is_going) for upload in self._uploads("*")),
                    ((self.content(name).text_sha256, name) for name in self._names()),
                )
            yield

    def _content(self, name: str) -> Path:
        return self._folder / "contents" / name

    def _record(self, tenant: str, file_id: str) -> Path:
        return self._folder / "tenants" / tenant / f"{file_id}.json"

    def _uploads(self, tenants: str) -> list[Upload]:
        found = [_read(path) for path in self._folder.glob(f"tenants/{tenants}/file-*.json")]
        return [upload for upload in found if upload]

    def _names(self) -> list[str]:
        return [path.parent.name for path in self._folder.glob("contents/[0-9a-f]*/state.json")]

    def _is_stored(self, name: str) -> bool:
        return (self._content(name) / "state.json").is_file()

    def _set(self, name: str, content: Content) -> None:
        _write(self._content(name) / "state.json", asdict(content))

    def _bytes(self, name: str, what: str) -> bytes:
        try:
            return (self._content(name) / what).read_bytes()
        except FileNotFoundError:
            raise FileNotStored("the file was deleted") from None


def _read(path: Path) -> Upload | None:
    """None where the record was deleted meanwhile."""
    try:
        return Upload(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None


def _write(path: Path, record: dict[str, object]) -> None:
    write_whole(path, json.dumps(record).encode())
