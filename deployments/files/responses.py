"""Answers of `/v1/responses` that later requests go on from, in the folder of the files.

    tenants/<tenant>/responses/<response id>.json   the answer, its input items, and the messages up to its end

Each is written beside its place and renamed, and belongs to one tenant.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any, Protocol

from deployments.files.disk import write_whole
from rapid.errors import InvalidRequest, RapidError

_ID = re.compile(r"resp_[0-9a-f]{32}")


class ResponseNotStored(RapidError):
    """The answer is absent, was deleted, is too old, or belongs to another tenant."""

    _code = "response_not_found"
    _status = 404


class Responses(Protocol):
    """`StoredResponses`, or those of another process."""

    async def get(self, tenant: str, response_id: str, param: str = "response_id") -> dict[str, Any]: ...
    async def put(self, tenant: str, response_id: str, record: dict[str, Any]) -> None: ...
    async def delete(self, tenant: str, response_id: str) -> None: ...


class StoredResponses:
    """Keeps each answer for ``keep_hours``, and of one tenant the newest that take ``max_bytes`` together."""

    def __init__(self, folder: Path, keep_hours: float, max_bytes: float) -> None:
        self._folder, self._keep_s, self._max_bytes = folder, keep_hours * 3600, max_bytes

    async def get(self, tenant: str, response_id: str, param: str = "response_id") -> dict[str, Any]:
        """
        Raises:
            ResponseNotStored: there is no such answer any more; the error names ``param``.
        """
        return await asyncio.to_thread(self._get, tenant, response_id, param)

    async def put(self, tenant: str, response_id: str, record: dict[str, Any]) -> None:
        """Stores an answer; the oldest of the tenant go where there is no room.

        Raises:
            InvalidRequest: the answer alone is larger than the room.
        """
        await asyncio.to_thread(self._put, tenant, response_id, record)

    async def delete(self, tenant: str, response_id: str) -> None:
        """
        Raises:
            ResponseNotStored: there is no such answer any more.
        """
        await asyncio.to_thread(self._get, tenant, response_id, "response_id")
        self._place(tenant, response_id).unlink(missing_ok=True)

    def _get(self, tenant: str, response_id: str, param: str) -> dict[str, Any]:
        absent = ResponseNotStored(f"there is no response {response_id!r}", param=param)
        if not _ID.fullmatch(response_id):  # another string could be a path to any file
            raise absent
        place = self._place(tenant, response_id)
        try:
            if time.time() - place.stat().st_mtime > self._keep_s:
                place.unlink(missing_ok=True)
                raise absent
            record: dict[str, Any] = json.loads(place.read_bytes())
        except FileNotFoundError:
            raise absent from None
        return record

    def _put(self, tenant: str, response_id: str, record: dict[str, Any]) -> None:
        data = json.dumps(record).encode()
        if len(data) > self._max_bytes:
            limit = f"{self._max_bytes / 1e6:g} MB"
            message = f"this conversation is larger than {limit}, which is all that is kept: set store to false"
            raise InvalidRequest(message, param="store", code="storage_limit_exceeded", status=413)
        place = self._place(tenant, response_id)
        place.parent.mkdir(parents=True, exist_ok=True)
        self._make_room(place.parent, len(data))
        write_whole(place, data)

    def _make_room(self, folder: Path, num_bytes: int) -> None:
        known = []
        for path in folder.glob("resp_*.json"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process has removed it
                continue
            known.append((stat.st_mtime, stat.st_size, path))
        room, now = self._max_bytes - num_bytes, time.time()
        for modified, size, path in sorted(known, reverse=True):
            room -= size
            if room < 0 or now - modified > self._keep_s:
                path.unlink(missing_ok=True)

    def _place(self, tenant: str, response_id: str) -> Path:
        return self._folder / "tenants" / tenant / "responses" / f"{response_id}.json"
