"""Uploads in parts on disk: what they take and leave there, and what two requests at once make of one."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deployments.files import parts, uploads
from deployments.files.parts import PartStore, UploadNotStored
from deployments.files.records import Content
from deployments.files.store import FileStore
from deployments.files.uploads import StoredUploads
from deployments.schemas.uploads import CompleteRequest, UploadObject, UploadRequest
from rapid.errors import InvalidRequest, RapidError

OURS, ROOM = "ours", 100


class Files:
    """Files that have no text; ``on_upload`` is awaited before one is stored."""

    def __init__(self, store: FileStore) -> None:
        self._store, self.on_upload = store, asyncio.Event()
        self.on_upload.set()
        self.begun = asyncio.Event()
        self.error: RapidError | None = None

    async def upload(self, tenant: str, filename: str, purpose: str, data: bytes, *how: Any) -> dict[str, Any]:
        self.begun.set()
        await self.on_upload.wait()
        if self.error:
            raise self.error
        content = Content("text/plain", hashlib.sha256(data).hexdigest(), 0)
        return {"id": self._store.put(tenant, filename, purpose, data, "", content, *how).id}

    async def get(self, tenant: str, file_id: str) -> dict[str, Any]:
        return {"id": self._store.upload(tenant, file_id).id}


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = FileStore(folder, ROOM, 3)
        self.files = Files(self.store)
        self.uploads = self.another()

    def another(self) -> StoredUploads:
        """The same uploads, as another process sees them."""
        return StoredUploads(self.store, self.files, ROOM)  # type: ignore[arg-type]

    async def create(self, num_bytes: int = 6, tenant: str = OURS) -> str:
        body = UploadRequest(bytes=num_bytes, filename="a.txt", mime_type="text/plain", purpose="user_data")
        return (await self.uploads.create(tenant, body)).id

    async def add(self, upload_id: str, data: bytes) -> str:
        return (await self.uploads.add_part(OURS, upload_id, data)).id

    async def complete(self, upload_id: str, *part_ids: str, by: StoredUploads | None = None) -> UploadObject:
        return await (by or self.uploads).complete(OURS, upload_id, CompleteRequest(part_ids=list(part_ids)))

    def left(self, upload_id: str) -> list[str]:
        return sorted(path.name for path in self.folder.glob(f"tenants/*/uploads/{upload_id}/*"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 30))


def refused(error: pytest.ExceptionInfo[RapidError]) -> tuple[int, str, str | None]:
    return error.value.status, error.value.code, error.value.param


def test_parts_become_a_file_in_the_order_that_is_named(world: World) -> None:
    async def story() -> None:
        upload_id = await world.create()
        first, second, _ = [await world.add(upload_id, data) for data in (b"abc", b"d", b"ef")]
        third = await world.add(another := await world.create(2), b"ef")
        for part_ids in ([first, second, third], ["../" + upload_id], ["record.json"], []):  # of another, and of none
            with pytest.raises(InvalidRequest) as caught:
                await world.complete(upload_id, *part_ids)
            assert refused(caught) == (400, "invalid_request", "part_ids")
        assert (await world.complete(another, third)).status == "completed"
        with pytest.raises(InvalidRequest, match="4 bytes together, and 6 were announced"):
            await world.complete(upload_id, first, second)
        done = await world.complete(upload_id, second, first, second, second)  # a part may be named again
        assert done.file is not None and await world.uploads.get(OURS, upload_id) == done
        content = world.store.upload(OURS, done.file["id"]).content
        assert world.store.original(content) == b"dabcdd"
        assert world.left(upload_id) == ["record.json"] and not list(world.folder.glob("claims/*"))
        world.store.remove(OURS, done.file["id"])
        assert (await world.uploads.get(OURS, upload_id)).status == "completed"  # and its file is gone

    run(story())


def test_what_is_announced_is_taken_from_the_room_until_the_upload_ends(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        upload_id = await world.create(60)
        world.store.check_room(OURS, 40)
        with pytest.raises(InvalidRequest, match="uploads that are open") as caught:
            world.store.check_room(OURS, 41)
        assert refused(caught) == (413, "storage_limit_exceeded", "file")
        with pytest.raises(InvalidRequest) as caught:
            await world.create(41)
        assert refused(caught) == (413, "storage_limit_exceeded", "bytes")
        await world.create(100, "theirs")
        await world.complete(upload_id, await world.add(upload_id, b"x" * 60))  # its own room
        with pytest.raises(InvalidRequest):
            world.store.check_room(OURS, 41)
        cancelled = await world.create(40)
        await world.uploads.cancel(OURS, cancelled)
        await world.create(40)
        monkeypatch.setattr(parts, "OPEN_S", 0)  # their hour is over, whether or not anybody has asked since
        world.store.check_room(OURS, 40)

    run(story())


def test_open_uploads_count_as_files(world: World) -> None:
    async def story() -> None:
        opened = [await world.create(1) for _ in range(3)]
        with pytest.raises(InvalidRequest, match="3 files"):
            await world.create(1)
        for upload_id in opened:
            await world.complete(upload_id, await world.add(upload_id, b"x"))

    run(story())


def test_requests_at_once_have_no_more_room_than_one_after_another(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_room, sizes = FileStore.check_room, PartStore.sizes

    def checked_slowly(store: FileStore, *how: Any) -> None:
        check_room(store, *how)
        time.sleep(0.02)  # whoever could look meanwhile would see the same room

    def counted_slowly(store: PartStore, *which: str) -> dict[str, int]:
        found = sizes(store, *which)
        time.sleep(0.02)
        return found

    monkeypatch.setattr(FileStore, "check_room", checked_slowly)
    monkeypatch.setattr(PartStore, "sizes", counted_slowly)

    async def story() -> None:
        created = await asyncio.gather(*(world.create(60) for _ in range(8)), return_exceptions=True)
        [upload_id] = [found for found in created if isinstance(found, str)]
        added = await asyncio.gather(*(world.add(upload_id, b"x" * 25) for _ in range(8)), return_exceptions=True)
        whole = [found for found in added if isinstance(found, str)]
        assert len(whole) == 2 and world.left(upload_id) == sorted([*whole, "record.json"])
        assert {refusal.param for refusal in added if isinstance(refusal, InvalidRequest)} == {"data"}

    run(story())


def test_an_hour_later_nobody_finds_an_upload_and_the_next_request_removes_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        completing, forgotten = await world.create(1), await world.create(1)
        theirs = await world.create(1, "theirs")
        part_id = await world.add(completing, b"x")
        await world.add(forgotten, b"x")
        world.files.on_upload.clear()
        task = asyncio.create_task(world.complete(completing, part_id))
        await world.files.begun.wait()
        monkeypatch.setattr(parts, "OPEN_S", 0)
        for ask in (world.uploads.get(OURS, forgotten), world.add(forgotten, b"x"), world.complete(forgotten)):
            with pytest.raises(UploadNotStored):
                await ask
        assert world.left(forgotten) == world.left(theirs) == []
        assert world.left(completing) == sorted([part_id, "record.json"])  # not under the hands of its request
        world.files.on_upload.set()
        assert (await task).status == "completed"
        assert await world.uploads.list_open(OURS) == []
        assert not list(world.folder.glob("tenants/*/uploads/*"))

    run(story())


def test_one_request_ends_an_upload(world: World) -> None:
    async def story() -> None:
        upload_id = await world.create(1)
        part_id = await world.add(upload_id, b"x")
        world.files.on_upload.clear()
        first = asyncio.create_task(world.complete(upload_id, part_id))
        await world.files.begun.wait()
        behind = asyncio.create_task(world.complete(upload_id, part_id))
        for ask in (world.complete(upload_id, part_id, by=world.another()), world.uploads.cancel(OURS, upload_id)):
            with pytest.raises(InvalidRequest) as caught:
                await ask
            assert refused(caught) == (409, "upload_busy", "upload_id")
        world.files.on_upload.set()
        assert (await first).status == "completed"
        with pytest.raises(InvalidRequest, match="is completed"):
            await behind
        assert len(world.store.uploads(OURS)) == 1

    run(story())


def test_a_file_that_is_refused_leaves_its_upload_open(world: World) -> None:
    async def story() -> None:
        upload_id = await world.create(1)
        part_id = await world.add(upload_id, b"x")
        world.files.error = InvalidRequest("it has no text", param="file", code="unreadable_file")
        with pytest.raises(InvalidRequest) as caught:
            await world.complete(upload_id, part_id)
        assert refused(caught) == (400, "unreadable_file", "part_ids")
        assert [found.id for found in await world.uploads.list_open(OURS)] == [upload_id]
        world.files.error = None
        assert (await world.complete(upload_id, part_id)).status == "completed"

    run(story())


def test_a_part_that_comes_while_its_upload_is_cancelled_leaves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = PartStore.unfinished

    @contextmanager
    def cancelled_meanwhile(store: PartStore, tenant: str, upload_id: str, data: bytes) -> Iterator[Path]:
        with write(store, tenant, upload_id, data) as written:
            world.uploads._cancel(tenant, upload_id)
            yield written

    async def story() -> None:
        upload_id = await world.create()
        await world.add(upload_id, b"abc")
        monkeypatch.setattr(PartStore, "unfinished", cancelled_meanwhile)
        with pytest.raises(InvalidRequest, match="is cancelled"):
            await world.add(upload_id, b"abc")
        assert world.left(upload_id) == ["record.json"]

    run(story())


def test_uploads_and_their_parts_are_not_without_number(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_MOST_OPEN", 2)
    monkeypatch.setattr(uploads, "_MOST_KEPT", 4)
    monkeypatch.setattr(uploads, "MAX_PARTS", 2)

    async def story() -> None:
        ended = []
        for _ in range(5):
            ended.append(await world.create(1))
            await world.uploads.cancel(OURS, ended[-1])
        opened = [await world.create(4), await world.create(1)]
        with pytest.raises(InvalidRequest, match="2 open uploads") as caught:
            await world.create(1)
        assert caught.value.status == 413
        assert [upload.id for upload in world.store.parts.uploads(OURS)] == ended[-2:] + opened
        for _ in range(2):
            await world.add(opened[0], b"x")
        with pytest.raises(InvalidRequest, match="2 parts"):
            await world.add(opened[0], b"x")

    run(story())


def test_an_upload_reads_no_record_of_another_key(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    read_bytes = Path.read_bytes

    def watched(path: Path) -> bytes:
        read.append(path)
        return read_bytes(path)

    async def story() -> None:
        await world.create(1, "theirs")
        monkeypatch.setattr(Path, "read_bytes", watched)
        upload_id = await world.create(1)
        await world.complete(upload_id, await world.add(upload_id, b"x"))
        assert read and not [path for path in read if "theirs" in path.parts]

    run(story())
