"""The process that answers batches: it goes on where another stopped, waits where there is no place, and ends."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.config import parse_config
from deployments.files import batches as stored
from deployments.files.batch_records import UNFINISHED, BatchTaken
from deployments.files.batches import StoredBatches
from deployments.http import batch_runner
from deployments.http.api import make_api
from deployments.http.batch_runner import BatchRunner
from rapid.errors import RapidError

ENDPOINT = "/v1/completions"


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """``test`` in an event loop of its own."""

    @wraps(test)
    def call(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return call


class Files:
    """What `StoredBatches` asks of the files, in memory."""

    def __init__(self, num_requests: int) -> None:
        lines = [{"custom_id": str(i), "method": "POST", "url": ENDPOINT, "body": {}} for i in range(num_requests)]
        self.data: dict[str, bytes] = {"in": "\n".join(map(json.dumps, lines)).encode()}

    async def get(self, tenant: str, file_id: str) -> dict[str, Any]:
        return {"purpose": "batch"}

    async def content(self, tenant: str, file_id: str) -> tuple[str, bytes]:
        if file_id not in self.data:
            raise RapidError("there is no such file", status=404)
        return "in.jsonl", self.data[file_id]

    async def check_room(self, tenant: str, num_bytes: int) -> None: ...

    async def add_output(self, tenant: str, filename: str, data: bytes, expires_after_s: int | None) -> str:
        self.data[filename] = data
        return filename


class World:
    """Batches of one tenant in a folder, and an API that answers as the test says."""

    def __init__(self, folder: Path, num_requests: int) -> None:
        self.files = Files(num_requests)
        self.batches = StoredBatches(folder, self.files)  # type: ignore[arg-type]
        self.statuses: list[int] = []  # of the next answers; 200 where there are none
        self.num_asked = self.num_running = self.num_most = 0
        self.held = asyncio.Event()
        self.held.set()

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        self.num_asked += 1
        self.num_running += 1
        self.num_most = max(self.num_most, self.num_running)
        try:
            await asyncio.sleep(0)
            await self.held.wait()
        finally:
            self.num_running -= 1
        headers = [(b"retry-after", b"0")]
        status = self.statuses.pop(0) if self.statuses else 200
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    def runner(self, at_once: int = 2) -> BatchRunner:
        return BatchRunner(self.app, self, at_once)  # type: ignore[arg-type]

    async def create(self) -> str:
        asked = {"input_file_id": "in", "endpoint": ENDPOINT, "completion_window": "24h"}
        return str((await self.batches.create("t", "t", asked))["id"])

    async def until(self, batch_id: str, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        async with asyncio.timeout(30):
            while not is_so(batch := await self.batches.get("t", batch_id)):
                await asyncio.sleep(0.005)
        return batch

    async def ended(self, batch_id: str) -> dict[str, Any]:
        return await self.until(batch_id, lambda batch: batch["status"] not in UNFINISHED)

    def answered(self, batch: dict[str, Any], which: str = "output") -> list[str]:
        lines = self.files.data.get(batch[f"{which}_file_id"], b"").splitlines()
        return sorted((json.loads(line)["custom_id"] for line in lines), key=int)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "BEAT_S", 0.01)
    monkeypatch.setattr(batch_runner, "_LOOK_S", 0.01)


@in_loop
async def test_another_process_goes_on(tmp_path: Path) -> None:
    world, loop, threads = World(tmp_path, 40), asyncio.get_running_loop(), ThreadPoolExecutor(4)
    loop.set_default_executor(threads)
    first = world.runner(at_once=3)
    batch_id = await world.create()
    first.wake()
    await world.until(batch_id, lambda batch: batch["request_counts"]["completed"] >= 10)
    world.held.clear()
    await first.close()  # with requests under way
    threads.shutdown()  # what it had begun to write is written
    threads = ThreadPoolExecutor(4)
    loop.set_default_executor(threads)
    batch = await world.batches.get("t", batch_id)
    done = batch["request_counts"]["completed"]
    assert batch["status"] == "in_progress" and 10 <= done < 40
    with (tmp_path / "tenants/t/batches" / f"{batch_id}.answers").open("ab") as file:
        file.write(b'{"custom_id": "3')  # it died over this line
    world.held.set()

    second = world.runner(at_once=3)
    claim = await world.batches.claim("other")
    assert claim.record is None and claim.are_any_left  # the first was heard of just now
    record = tmp_path / "tenants/t/batches" / f"{batch_id}.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"heard_at": 0}))
    second.wake()
    batch = await world.ended(batch_id)
    assert batch["status"] == "completed" and batch["request_counts"] == {"total": 40, "completed": 40, "failed": 0}
    assert world.answered(batch) == [str(i) for i in range(40)]
    assert world.num_asked <= 40 + 3  # what was under way is asked again, what was answered is not
    assert world.num_most <= 3
    threads.shutdown()  # the answers go after the record says where the output is
    assert [path.suffix for path in (tmp_path / "tenants/t/batches").glob("batch_*")] == [".json"]


@in_loop
async def test_a_process_that_was_thought_dead_writes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, 1)
    await world.create()
    slow = (await world.batches.claim("slow")).record
    assert slow is not None
    monkeypatch.setattr(stored, "_DEAD_AFTER_S", 0.0)
    assert (await world.batches.claim("quick")).record is not None
    for call in (
        world.batches.beat(slow),
        world.batches.add_answer(slow, "{}"),
        world.batches.finish(slow, "completed"),
    ):
        with pytest.raises(BatchTaken):
            await call


@in_loop
async def test_a_request_without_a_place_is_sent_again(tmp_path: Path) -> None:
    world = World(tmp_path, 1)
    world.statuses = [429] * 10 + [503] * 3
    runner = world.runner()
    batch_id = await world.create()
    runner.wake()
    assert world.answered(await world.ended(batch_id)) == ["0"] and world.num_asked == 14
    world.statuses = [503] * 4
    batch_id = await world.create()
    runner.wake()
    batch = await world.ended(batch_id)
    assert batch["request_counts"]["failed"] == 1 and world.answered(batch, "error") == ["0"]


@in_loop
async def test_a_batch_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, 3)
    world.held.clear()
    monkeypatch.setattr(stored, "_WINDOW_S", 0)
    batch_id = await world.create()
    time.sleep(1.1)  # the moments of a batch are whole seconds
    world.runner().wake()
    batch = await world.ended(batch_id)
    assert batch["status"] == "expired" and batch["expired_at"] and batch["output_file_id"] is None
    assert world.num_running == 0


@in_loop
async def test_a_batch_whose_input_is_gone_fails(tmp_path: Path) -> None:
    world = World(tmp_path, 1)
    batch_id = await world.create()
    world.files.data.clear()
    world.runner().wake()
    batch = await world.ended(batch_id)
    assert batch["status"] == "failed" and "no such file" in batch["errors"]["data"][0]["message"]


@in_loop
async def test_a_name_is_no_path_to_another_tenants_batch(tmp_path: Path) -> None:
    world = World(tmp_path, 1)
    batch_id = await world.create()
    await world.batches.create("u", "u", {"input_file_id": "in", "endpoint": ENDPOINT, "completion_window": "24h"})
    for name in (batch_id, f"../../t/batches/{batch_id}"):
        with pytest.raises(RapidError) as refused:
            await world.batches.get("u", name)
        assert refused.value.status == 404


@in_loop
async def test_unfinished_batches_of_a_key_are_bounded(tmp_path: Path) -> None:
    world = World(tmp_path, 1)
    for _ in range(stored._MOST_UNFINISHED):
        await world.create()
    with pytest.raises(RapidError, match="unfinished") as refused:
        await world.create()
    assert refused.value.status == 429


@in_loop
async def test_batches_of_an_invalid_key_are_answered_no_more(tmp_path: Path) -> None:
    world = World(tmp_path, 1)
    api = make_api(parse_config({"access": {"api_keys": ["a", "b"]}}), world)  # type: ignore[arg-type]
    runner = BatchRunner(api, world, 1)  # type: ignore[arg-type]
    batch_id = await world.create()  # of a tenant who is neither
    runner.wake()
    batch = await world.ended(batch_id)
    [line] = world.files.data[batch["error_file_id"]].splitlines()
    assert json.loads(line)["response"]["status_code"] == 401


@in_loop
async def test_the_api_looks_for_batches_when_it_starts(tmp_path: Path) -> None:
    world = World(tmp_path, 1)
    batch_id = await world.create()
    api = make_api(parse_config({}), world)  # type: ignore[arg-type]
    async with api.router.lifespan_context(api):
        batch = await world.ended(batch_id)
    assert batch["status"] == "completed"


@in_loop
async def test_no_header_makes_a_request_one_of_a_batch() -> None:
    api = make_api(parse_config({"access": {"api_keys": ["a"]}}), World(Path("nowhere"), 0))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://127.0.0.1") as http:
        answer = await http.get("/v1/files", headers={"rapid.asked_for": "a"})
    assert answer.status_code == 401
