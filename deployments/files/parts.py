"""Uploads that come in parts, in the folder of the files.

    tenants/<tenant>/uploads/<upload id>/record.json  what was announced, and what has become of it
    tenants/<tenant>/uploads/<upload id>/<part id>    the bytes of a part, while the upload is open

Each is written beside its place and renamed. An upload's id says when it began, so that those whose hour is over are
found by their names. The caller holds the folder's lock where something changes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from deployments.files.disk import write_whole
from rapid.errors import RapidError

OPEN_S = 3600  # OpenAI's: an hour after its beginning nobody finds an upload
_UPLOAD_ID, _PART_ID = re.compile(r"upload_[0-9a-f]{32}"), re.compile(r"part_[0-9a-f]{32}")


class UploadNotStored(RapidError):
    """The upload is absent, began more than an hour ago, or belongs to another tenant."""

    _code = "upload_not_found"
    _status = 404


@dataclass(frozen=True)
class PartedUpload:
    """One tenant's upload of ``bytes`` in parts, and the file that came of it once it is ``completed``.

    The file expires ``expires_after_s`` after it is made.
    """

    id: str
    bytes: int
    filename: str
    purpose: str
    expires_after_s: int | None = None
    status: Literal["pending", "completed", "cancelled"] = "pending"
    file_id: str | None = None

    @property
    def is_open(self) -> bool:
        return self.status == "pending"

    @property
    def created_at(self) -> int:
        return _began(self.id)

    @property
    def expires_at(self) -> int:
        return self.created_at + OPEN_S


def new_id() -> str:
    """An id of an upload that begins now; ids are in the order of their uploads."""
    return f"upload_{time.time_ns():016x}{uuid.uuid4().hex[:16]}"


def _began(upload_id: str) -> int:
    return int(upload_id[7:23], 16) // 10**9


def _is_over(upload_id: str) -> bool:
    return _began(upload_id) + OPEN_S <= time.time()


class PartStore:
    """The uploads in parts under ``folder``, which holds the files of a `deployments.files.store.FileStore`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def uploads(self, tenant: str) -> list[PartedUpload]:
        """The tenant's, the oldest first."""
        found = []
        for path in sorted(self._folder.glob(f"tenants/{tenant}/uploads/upload_*")):
            with suppress(UploadNotStored):
                found.append(self.get(tenant, path.name))
        return found

    def get(self, tenant: str, upload_id: str) -> PartedUpload:
        """
        Raises:
            UploadNotStored: there is no such upload any more.
        """
        if _UPLOAD_ID.fullmatch(upload_id) and not _is_over(upload_id):  # another string could be a path to any file
            with suppress(FileNotFoundError):
                return PartedUpload(**json.loads((self._place(tenant, upload_id) / "record.json").read_bytes()))
        raise _absent(upload_id)

    def put(self, tenant: str, upload: PartedUpload) -> None:
        """Stores what is known of an upload. Of one that is not open any more the parts go."""
        place = self._place(tenant, upload.id)
        write_whole(place / "record.json", json.dumps(asdict(upload)).encode())
        if not upload.is_open:
            for path in place.iterdir():
                if path.name != "record.json":
                    path.unlink(missing_ok=True)

    @contextmanager
    def unfinished(self, tenant: str, upload_id: str, data: bytes) -> Iterator[Path]:
        """A file with ``data`` beside the parts of an upload, for `add`; it is removed where that does not take it.

        Raises:
            FileNotFoundError: the upload is not there.
        """
        path = self._place(tenant, upload_id) / f".{uuid.uuid4().hex}"
        try:
            path.write_bytes(data)
            yield path
        finally:
            path.unlink(missing_ok=True)

    def add(self, written: Path) -> str:
        """Makes what `unfinished` has written a part, and returns the part's id."""
        part_id = f"part_{uuid.uuid4().hex}"
        os.replace(written, written.with_name(part_id))
        return part_id

    def sizes(self, tenant: str, upload_id: str) -> dict[str, int]:
        """The bytes of each part by its id."""
        place = self._place(tenant, upload_id)
        return {path.name: path.stat().st_size for path in place.iterdir() if _PART_ID.fullmatch(path.name)}

    def joined(self, tenant: str, upload_id: str, part_ids: Iterable[str]) -> bytes:
        """The bytes of the named parts, all of which `sizes` has named, one behind another."""
        place = self._place(tenant, upload_id)
        return b"".join((place / part_id).read_bytes() for part_id in part_ids)

    def over(self) -> list[tuple[str, str]]:
        """(tenant, upload id) of all whose hour is over and that are still there."""
        found = [path for path in self._folder.glob("tenants/*/uploads/*") if _UPLOAD_ID.fullmatch(path.name)]
        return [(path.parts[-3], path.name) for path in found if _is_over(path.name)]

    def remove(self, tenant: str, upload_id: str) -> None:
        """Removes an upload with its parts. What stays because it comes at this moment goes the next time."""
        shutil.rmtree(self._place(tenant, upload_id), ignore_errors=True)

    def _place(self, tenant: str, upload_id: str) -> Path:
        return self._folder / "tenants" / tenant / "uploads" / upload_id


def _absent(upload_id: str) -> UploadNotStored:
    return UploadNotStored(f"there is no upload {upload_id[:64]!r}, or its hour is over", param="upload_id")
