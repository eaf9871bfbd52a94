"""Files when something fails or two things happen at once: nothing is left behind, and nothing untrue is said."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import shutil
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from deployments.config import parse_config
from deployments.datastores import Datastores
from deployments.files import store as file_store
from deployments.files.files import LocalFiles
from deployments.files.records import Content, FileNotStored
from deployments.files.store import FileStore
from deployments.schemas.messages import FilePart, FileReference
from deployments.serve import backend as ray_backend
from deployments.serve import engine_actors
from deployments.serve.backend import RayBackend
from deployments.serve.engines import engines_of
from deployments.turns import FairPool
from rapid.errors import InvalidRequest, RapidError, RetrievalFailed
from retrieval import IndexProgress

OURS = "ours"
DATA = b"abc abc"
MARKED = b"\xef\xbb\xbf" + DATA  # other bytes, the same text
TEXT_SHA256 = hashlib.sha256(DATA).hexdigest()


class Backend:
    """Vectors are a set of whose they are; ``on`` has what happens in the middle of a method."""

    def __init__(self) -> None:
        self.vectors: set[str] = set()
        self.forgotten: list[list[int]] = []
        self.on: dict[str, Callable[[], Awaitable[None]]] = {}

    async def _at(self, method: str) -> None:
        if happening := self.on.get(method):
            await happening()

    def halt_at(self, method: str) -> tuple[asyncio.Event, asyncio.Event]:
        """(set once it is halfway through, to be set for it to go on)"""
        begun, goes_on = asyncio.Event(), asyncio.Event()

        async def halts() -> None:
            begun.set()
            await goes_on.wait()

        self.on[method] = halts
        return begun, goes_on

    async def keep(self, text: str, chunk_tokens: int, tenant: str = "") -> AsyncIterator[IndexProgress]:
        tenant = hashlib.sha256(text.encode()).hexdigest()
        if tenant not in self.vectors:
            yield IndexProgress(tenant, 0, 2)
            await self._at("keep")
            yield IndexProgress(tenant, 1, 2)
            self.vectors.add(tenant)
        yield IndexProgress(tenant, 2, 2)

    async def delete(self, vectors: str) -> None:
        await self._at("delete")
        self.vectors.discard(vectors)

    async def forget(self, tokens: list[int], salt: str = "") -> None:
        await self._at("forget")
        self.forgotten.append(tokens)


class World:
    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        config = {"target": {"model": "none"}, "files": {"folder": str(folder)}}
        self.folder, self.backend = folder, Backend()
        readers = FairPool(1, "read")
        settings = parse_config(config)
        datastores = Datastores(settings, tokenizer)
        self.files = LocalFiles(settings, self.backend, tokenizer, readers, datastores)  # type: ignore[arg-type]

    async def upload(self, data: bytes = DATA) -> str:
        file_id: str = (await self.files.upload(OURS, "a.txt", "user_data", data))["id"]
        return file_id

    async def status(self, file_id: str) -> tuple[str, str | None]:
        """Once nothing is being embedded."""
        while (file := await self.files.get(OURS, file_id))["status"] == "processing":
            await asyncio.sleep(0)
        return file["status"], file["status_details"]

    def left(self) -> set[str]:
        return {path.name for path in self.folder.rglob("*") if path.is_file()} - {"lock"}


@pytest.fixture
def world(tmp_path: Path, letter_tokenizer: Callable[[int], PreTrainedTokenizerFast]) -> World:
    return World(tmp_path, letter_tokenizer(12))


async def fails() -> None:
    raise RetrievalFailed("Qdrant is down")


@pytest.mark.parametrize("method", ["forget", "delete", "rmtree"])
def test_a_deletion_that_failed_can_be_done_again(world: World, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        file_id = await world.upload()
        assert await world.status(file_id) == ("processed", None)
        world.backend.on[method] = fails
        with monkeypatch.context() as patched:
            if method == "rmtree":
                patched.setattr(file_store, "shutil", SimpleNamespace(rmtree=None))
            with pytest.raises((RetrievalFailed, TypeError)):
                await world.files.delete(OURS, file_id)
        for use in (world.files.content, world.files.warm):
            with pytest.raises(FileNotStored):
                await use(OURS, file_id)
        if method != "rmtree":
            [file] = await world.files.list_files(OURS)
            assert (file["id"], file["status"]) == (file_id, "error")
        world.backend.on.clear()
        await world.files.delete(OURS, file_id)
        assert world.left() == world.backend.vectors == set() and world.backend.forgotten
        with pytest.raises(FileNotStored):
            await world.files.delete(OURS, file_id)

    asyncio.run(story())


def test_a_deletion_in_the_middle_of_embedding_leaves_nothing(world: World) -> None:
    async def story() -> None:
        begun, goes_on = world.backend.halt_at("keep")
        file_id = await world.upload()
        await begun.wait()
        deletion = asyncio.create_task(world.files.delete(OURS, file_id))
        while (await world.files.get(OURS, file_id))["status"] == "processing":
            await asyncio.sleep(0)
        goes_on.set()
        await deletion
        assert world.left() == world.backend.vectors == set()

    asyncio.run(story())


@pytest.mark.parametrize("data", [DATA, MARKED], ids=["same bytes", "same text"])
@pytest.mark.parametrize("method", ["forget", "delete"])
def test_an_upload_during_the_last_deletion_ends_with_its_vectors(world: World, method: str, data: bytes) -> None:
    async def story() -> None:
        first = await world.upload()
        await world.status(first)
        later: list[str] = []

        async def uploads() -> None:
            later.append(await world.upload(data))

        world.backend.on[method] = uploads
        await world.files.delete(OURS, first)
        assert await world.status(later[0]) == ("processed", None) and world.backend.vectors == {TEXT_SHA256}
        world.backend.on.clear()
        await world.files.delete(OURS, later[0])
        assert world.left() == world.backend.vectors == set()

    asyncio.run(story())


def test_an_upload_that_found_what_was_then_deleted_ends_with_its_vectors(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        first = await world.upload()
        await world.status(first)
        put = FileStore.put

        def after_the_deletion(*args: Any) -> Any:
            asyncio.run_coroutine_threadsafe(world.files.delete(OURS, first), loop).result()
            return put(*args)

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(FileStore, "put", after_the_deletion)
        assert await world.status(await world.upload()) == ("processed", None)
        assert world.backend.vectors == {TEXT_SHA256}

    asyncio.run(story())


def test_who_shares_the_text_keeps_the_vectors_and_the_last_one_takes_them_along(world: World) -> None:
    async def story() -> None:
        begun, goes_on = world.backend.halt_at("keep")
        first = await world.upload()
        await begun.wait()
        second = await world.upload(MARKED)  # while the first one's are made, so it has not heard of them
        goes_on.set()
        await world.status(first)
        await world.files.delete(OURS, first)
        assert world.backend.vectors == {TEXT_SHA256} and world.backend.forgotten == []
        await world.files.delete(OURS, second)
        assert world.left() == world.backend.vectors == set()

    asyncio.run(story())


@pytest.mark.parametrize("error", [OSError("no space left"), RapidError("x"), RetrievalFailed("no Qdrant")], ids=repr)
def test_whatever_stops_embedding_is_told_and_an_upload_tries_again(world: World, error: Exception) -> None:
    async def story() -> None:
        async def breaks() -> None:
            raise error

        world.backend.on["keep"] = breaks
        file_id = await world.upload()
        why = "no Qdrant" if isinstance(error, RetrievalFailed) else "internal error"
        assert await world.status(file_id) == ("error", why)
        world.backend.on.clear()
        assert await world.status(file_id) == ("error", why)  # by itself it is not tried for ever
        await world.upload()
        assert await world.status(file_id) == ("processed", None)

    asyncio.run(story())


def test_a_list_leaves_out_what_is_deleted_meanwhile(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        stays, goes = await world.upload(), await world.upload(b"cab")
        uploads = FileStore.uploads

        def and_then_one_is_deleted(store: FileStore, tenant: str) -> Any:
            found = uploads(store, tenant)
            store.retire(tenant, goes)
            store.remove(tenant, goes)
            return found

        monkeypatch.setattr(FileStore, "uploads", and_then_one_is_deleted)
        assert [file["id"] for file in await world.files.list_files(OURS)] == [stays]

    asyncio.run(story())


def test_big_work_is_done_beside_the_event_loop(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    where: dict[str, set[threading.Thread]] = {}

    def noting(tenant: Any, name: str) -> None:
        real = getattr(tenant, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            where.setdefault(name, set()).add(threading.current_thread())
            return real(*args, **kwargs)

        monkeypatch.setattr(tenant, name, noted)

    async def story() -> None:
        noting(hashlib, "sha256")
        noting(base64, "b64decode")
        for name in ("text", "put", "retire", "release", "remove", "update"):
            noting(FileStore, name)
        noting(world.files._tokenizer, "__call__")
        monkeypatch.setattr(Backend, "keep", no_hashing)
        for _ in range(2):
            file_id = await world.upload()
            await world.status(file_id)
        part = FilePart(type="file", file=FileReference(file_data="YWJj"))
        assert await world.files.attachments._text(part, OURS, "here", {}) == "abc"
        await world.files.delete(OURS, file_id)

    async def no_hashing(self: Backend, text: str, chunk_tokens: int, tenant: str = "") -> AsyncIterator[IndexProgress]:
        yield IndexProgress("somebody", 1, 1)

    asyncio.run(story())
    assert where.keys() >= {"sha256", "b64decode", "text", "put", "retire", "release", "remove", "update"}
    assert threading.main_thread() not in set().union(*where.values())


def test_engines_are_looked_up_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, forgotten = [], []

    async def forget(tokens: list[int], salt: str = "") -> None:
        forgotten.append(tokens)

    def get_actor(name: str) -> Any:
        threads.append(threading.current_thread())
        return SimpleNamespace(forget=SimpleNamespace(remote=forget))

    def list_named_actors() -> list[str]:
        threads.append(threading.current_thread())
        return [engines_of("x", "Target") + "1", engines_of("y", "Target") + "1"]

    monkeypatch.setattr(engine_actors.serve, "get_replica_context", lambda: SimpleNamespace(app_name="x"))
    monkeypatch.setattr(engine_actors.ray.util, "list_named_actors", list_named_actors)
    monkeypatch.setattr(engine_actors.ray, "get_actor", get_actor)
    asyncio.run(RayBackend({}, None, overlap=False).forget([1, 2]))  # type: ignore[arg-type]
    assert forgotten == [[1, 2]] and threading.main_thread() not in threads and len(threads) == 2


def test_a_retriever_that_is_away_is_not_waited_for_by_a_deletion(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        answer = asyncio.get_running_loop().create_future()
        retriever = SimpleNamespace(delete=SimpleNamespace(remote=lambda _: answer))
        with pytest.raises(RetrievalFailed, match="did not answer in time"):
            await RayBackend({}, retriever, overlap=False).delete("x")  # type: ignore[arg-type]
        assert answer.cancelled()

    monkeypatch.setattr(ray_backend, "_NEEDED_TIMEOUT_S", 0.01)
    asyncio.run(story())


def test_uploads_at_once_have_no_more_room_than_one_after_another(world: World) -> None:
    """What is read from a file counts, too: a small PDF may stand for megabytes of text."""
    room = 3 * 2 * 1000
    world.files._store = store = FileStore(world.folder, room, 100)

    async def story() -> None:
        uploads = (world.upload(b"%d" % i * 1000) for i in range(8))
        results = await asyncio.gather(*uploads, return_exceptions=True)
        refused = [result for result in results if isinstance(result, InvalidRequest)]
        assert len(refused) == 5 and {error.code for error in refused} == {"storage_limit_exceeded"}
        assert sum(upload.stored for upload in store.uploads(OURS)) == room

    asyncio.run(story())
    with pytest.raises(InvalidRequest):
        store.put("another", "a.pdf", "user_data", b"small", "long" * room, Content("application/pdf", "", 1))
    assert not store.uploads("another")


def test_what_has_expired_is_read_by_nobody_and_then_deleted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any request about files starts the deletion, whoever's file it is; a deletion that fails is tried again."""

    async def story() -> None:
        stays = await world.upload(MARKED)
        ends = await world.files.upload("theirs", "a.txt", "user_data", b"xyz", 3600)
        await world.status(stays)
        while world.backend.vectors != {TEXT_SHA256, hashlib.sha256(b"xyz").hexdigest()}:
            await asyncio.sleep(0)
        now = time.time() + 3600
        monkeypatch.setattr(file_store, "time", SimpleNamespace(time=lambda: now))
        with pytest.raises(FileNotStored, match="expired"):
            await world.files.content("theirs", ends["id"])
        world.backend.on["forget"] = fails
        for left in ([("theirs", ends["id"])], []):
            await world.files.list_files(OURS)
            assert world.files._removing is not None
            await world.files._removing
            assert world.files._store.expired() == left
            world.backend.on = {}
        assert world.backend.vectors == {TEXT_SHA256}
        assert await world.files.list_files("theirs") == []
        assert [file["id"] for file in await world.files.list_files(OURS)] == [stays]

    asyncio.run(story())


def test_an_upload_reads_no_record_of_another_key(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a deletion: what one key stores must not make another's requests slow."""

    async def story() -> None:
        for i in range(3):
            await world.status(await world.upload(b"%d" % i))
        while world.files._indexer._running:  # what is embedded is added to a datastore, if there is one
            await asyncio.sleep(0)
        read: list[Path] = []
        read_bytes = Path.read_bytes

        def watched(path: Path) -> bytes:
            read.append(path)
            return read_bytes(path)

        monkeypatch.setattr(Path, "read_bytes", watched)
        theirs = await world.files.upload("theirs", "a.txt", "user_data", b"xyz")
        while (await world.files.get("theirs", theirs["id"]))["status"] == "processing":
            await asyncio.sleep(0)
        await world.files.delete("theirs", theirs["id"])
        assert read and not [path for path in read if OURS in path.parts]
        assert len({path.parent.name for path in read if "contents" in path.parts}) == 1

    asyncio.run(story())


def test_files_of_a_version_without_an_index_are_found_and_deleted(world: World) -> None:
    async def story() -> None:
        first, second = await world.upload(), await world.upload(MARKED)
        await world.status(first)
        await world.status(second)
        for name in ("uses", "texts"):
            shutil.rmtree(world.folder / name)
        await world.files.delete(OURS, first)
        assert world.backend.vectors == {TEXT_SHA256}  # the second has the same text
        await world.files.delete(OURS, second)
        assert world.backend.vectors == set() and world.left() == set()

    asyncio.run(story())
