"""Batches: files of requests that are answered when there is time, and what has been answered of each.

    tenants/<tenant>/batches/<batch id>.json      a `Record`
    tenants/<tenant>/batches/<batch id>.answers   a line for each request that was answered, in the order of the answers
    tenants/<tenant>/batches/<batch id>.finished  the same, while the files of the output are made

A process that answers a batch (`deployments.http.batch_runner`) claims it and tells every few seconds that it still
lives. What a process that died has left unanswered is claimed by the next one.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deployments.files.batch_records import BatchNotStored, BatchTaken, Claim, Record
from deployments.files.disk import locked, write_whole
from deployments.files.files import LocalFiles
from deployments.files.records import BATCH, FileNotStored
from rapid.errors import InvalidRequest, Overloaded

_ID = re.compile(r"batch_[0-9a-f]{32}")
_WINDOW_S = 24 * 3600
_KEPT_S = 30 * 24 * 3600  # after its end
_MOST_UNFINISHED = 32  # of one tenant
_DEAD_AFTER_S = 15.0  # without a word of the process that answers


class StoredBatches:
    """The batches in ``folder``; their output becomes files of ``files``."""

    def __init__(self, folder: Path, files: LocalFiles) -> None:
        self._folder, self._files = folder, files

    async def create(self, tenant: str, client: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Stores a new batch, as ``asked`` says (`schemas.batches.BatchRequest`), for a process to claim.

        Raises:
            FileNotStored: there is no such input file.
            InvalidRequest: the input file has another purpose.
            Overloaded: too many batches of the tenant are unfinished.
        """
        try:
            source = await self._files.get(tenant, asked["input_file_id"])
        except FileNotStored as error:
            error.param = "input_file_id"
            raise
        if source["purpose"] != BATCH:
            raise InvalidRequest("the purpose of this file is not batch", param="input_file_id")
        return await asyncio.to_thread(self._create, tenant, client, asked)

    def _create(self, tenant: str, client: str, asked: dict[str, Any]) -> dict[str, Any]:
        now = int(time.time())
        moments = ("cancelled", "cancelling", "completed", "expired", "failed", "finalizing", "in_progress")
        batch = {
            "id": f"batch_{time.time_ns():016x}{uuid.uuid4().hex[:16]}",  # in the order of their making
            "object": "batch",
            "endpoint": asked["endpoint"],
            "errors": None,
            "input_file_id": asked["input_file_id"],
            "completion_window": asked["completion_window"],
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "expires_at": now + _WINDOW_S,
            **{f"{moment}_at": None for moment in moments},
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": asked.get("metadata") or None,
        }
        expires = asked.get("output_expires_after") or {}
        with locked(self._place(tenant)):
            known = self._records(tenant)
            if sum(record.is_unfinished for record in known) >= _MOST_UNFINISHED:
                message = f"{_MOST_UNFINISHED} of your batches are unfinished: wait for one, or cancel it"
                raise Overloaded(message, status=429)
            for record in known:
                if not record.is_unfinished and now - record.batch["created_at"] > _WINDOW_S + _KEPT_S:
                    self._path(record, "json").unlink()
            self._write(Record(batch, tenant, client, expires.get("seconds")))
        return batch

    async def get(self, tenant: str, batch_id: str) -> dict[str, Any]:
        """OpenAI's batch object."""
        return (await asyncio.to_thread(self._read, tenant, batch_id)).batch

    async def list_batches(self, tenant: str) -> list[dict[str, Any]]:
        """The tenant's batches, the newest first."""
        return [record.batch for record in reversed(await asyncio.to_thread(self._records, tenant))]

    async def cancel(self, tenant: str, batch_id: str) -> dict[str, Any]:
        """Has the process that answers the batch stop soon.

        Raises:
            InvalidRequest: the batch has ended already.
        """
        return await asyncio.to_thread(self._cancel, tenant, batch_id)

    def _cancel(self, tenant: str, batch_id: str) -> dict[str, Any]:
        with self._changed(tenant, batch_id) as record:
            if record.batch["status"] not in ("validating", "in_progress", "cancelling"):
                raise InvalidRequest(f"the batch is {record.batch['status']} already", param="batch_id")
            record.move("cancelling")
        return record.batch

    async def claim(self, runner: str) -> Claim:
        """Gives the process ``runner`` the oldest batch that nobody answers, one of each tenant at a time."""
        return await asyncio.to_thread(self._claim, runner)

    def _claim(self, runner: str) -> Claim:
        are_any_left = False
        for place in sorted(self._folder.glob("tenants/*/batches")):
            with locked(place):
                unfinished = [record for record in self._records(place.parent.name) if record.is_unfinished]
                are_any_left |= bool(unfinished)
                if unfinished and all(time.time() - record.heard_at > _DEAD_AFTER_S for record in unfinished):
                    unfinished[0].runner, unfinished[0].heard_at = runner, time.time()
                    self._write(unfinished[0])
                    return Claim(unfinished[0], are_any_left=True)
        return Claim(None, are_any_left)

    async def begin(self, claimed: Record, total: int) -> set[str]:
        """Notes that the input is right and has ``total`` requests. Returns the names of those that are answered."""
        return await asyncio.to_thread(self._begin, claimed, total)

    def _begin(self, claimed: Record, total: int) -> set[str]:
        with self._held(claimed) as record:
            answers = [json.loads(line) for line in self._answers(record)]
            failed = sum(_has_failed(answer) for answer in answers)
            counts = {"total": total, "completed": len(answers) - failed, "failed": failed}
            record.batch["request_counts"] = counts
            if record.batch["status"] == "validating":
                record.move("in_progress")
        return {answer["custom_id"] for answer in answers}

    async def add_answer(self, claimed: Record, line: str) -> None:
        """Adds a line of the output (`schemas.batches.answer_line`).

        Raises:
            InvalidRequest: the tenant has no room for it.
            BatchTaken: another process answers the batch.
        """
        await self._files.check_room(claimed.tenant, len(line.encode()) + 1)
        await asyncio.to_thread(self._add_answer, claimed, line)

    def _add_answer(self, claimed: Record, line: str) -> None:
        with self._held(claimed) as record:
            with self._path(record, "answers").open("ab") as file:
                file.write(line.encode() + b"\n")
            record.batch["request_counts"]["failed" if _has_failed(json.loads(line)) else "completed"] += 1

    async def beat(self, claimed: Record) -> str:
        """Tells that the process of ``claimed`` lives. Returns the batch's status.

        Raises:
            BatchTaken: another process answers the batch.
        """
        return await asyncio.to_thread(self._beat, claimed)

    def _beat(self, claimed: Record) -> str:
        with self._held(claimed) as record:
            return str(record.batch["status"])

    async def finish(self, claimed: Record, status: str, errors: Sequence[dict[str, Any]] = ()) -> None:
        """Ends the batch: its answers become files.

        Raises:
            BatchTaken: another process answers the batch.
        """
        good, bad, usage = await asyncio.to_thread(self._finalize, claimed)
        made: dict[str, str] = {}
        for field_name, lines, name in (("output_file_id", good, "output"), ("error_file_id", bad, "error")):
            if lines:
                data, file_name = b"".join(lines), f"{claimed.id}_{name}.jsonl"
                made[field_name] = await self._files.add_output(
                    claimed.tenant, file_name, data, claimed.output_expires_s
                )
        await asyncio.to_thread(self._end, claimed, status, made, errors, usage)

    def _finalize(self, claimed: Record) -> tuple[list[bytes], list[bytes], dict[str, int] | None]:
        """The lines of what was answered, those of what failed, and the tokens of the first."""
        with self._held(claimed) as record:
            if record.batch["status"] == "in_progress":
                record.move("finalizing")
            answers, finished = self._path(record, "answers"), self._path(record, "finished")
            if answers.exists():  # from now on they do not count beside the files that are made of them
                answers.rename(finished)
            lines = finished.read_bytes().splitlines(keepends=True) if finished.exists() else []
        # Read here, in a thread: the answers of a night hold up the streams of nobody.
        bad = [_has_failed(json.loads(line)) for line in lines]
        good = [line for line, is_bad in zip(lines, bad, strict=True) if not is_bad]
        return good, [line for line, is_bad in zip(lines, bad, strict=True) if is_bad], _usage(good)

    def _end(
        self,
        claimed: Record,
        status: str,
        made: dict[str, str],
        errors: Sequence[dict[str, Any]],
        usage: dict[str, int] | None,
    ) -> None:
        with self._held(claimed) as record:
            record.batch |= made
            if usage:
                record.batch["usage"] = usage
            if errors:
                record.batch["errors"] = {"object": "list", "data": list(errors)}
            record.move(status)
        self._path(record, "finished").unlink(missing_ok=True)

    @contextmanager
    def _changed(self, tenant: str, batch_id: str) -> Iterator[Record]:
        """A record, which is written at the end of the block."""
        self._read(tenant, batch_id)  # before there is a lock for a tenant without batches
        with locked(self._place(tenant)):
            record = self._read(tenant, batch_id)
            yield record
            self._write(record)

    @contextmanager
    def _held(self, claimed: Record) -> Iterator[Record]:
        """The record of a batch that the process of ``claimed`` answers, as `_changed`."""
        with self._changed(claimed.tenant, claimed.id) as record:
            if record.runner != claimed.runner or not record.is_unfinished:
                raise BatchTaken(f"the batch {claimed.id} is answered by another process")
            record.heard_at = time.time()
            yield record

    def _answers(self, record: Record) -> list[bytes]:
        """The lines that were written whole; a process may have died over the last one."""
        path = self._path(record, "answers")
        if not path.exists():
            return []
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            write_whole(path, whole)
        return whole.splitlines(keepends=True)

    def _read(self, tenant: str, batch_id: str) -> Record:
        absent = BatchNotStored(f"there is no batch {batch_id!r}", param="batch_id")
        if not _ID.fullmatch(batch_id):  # another string could be a path to any file
            raise absent
        try:
            return Record(**json.loads((self._place(tenant) / f"{batch_id}.json").read_bytes()))
        except FileNotFoundError:
            raise absent from None

    def _records(self, tenant: str) -> list[Record]:
        """The tenant's batches, the oldest first."""
        return [self._read(tenant, path.stem) for path in sorted(self._place(tenant).glob("batch_*.json"))]

    def _write(self, record: Record) -> None:
        write_whole(self._path(record, "json"), json.dumps(asdict(record)).encode())

    def _path(self, record: Record, ending: str) -> Path:
        return self._place(record.tenant) / f"{record.id}.{ending}"

    def _place(self, tenant: str) -> Path:
        return self._folder / "tenants" / tenant / "batches"


def _has_failed(answer: dict[str, Any]) -> bool:
    return bool(answer["error"]) or answer["response"]["status_code"] >= 400


def _usage(answers: Sequence[bytes]) -> dict[str, int] | None:
    """The tokens of all ``answers``, under OpenAI's names."""
    told = [json.loads(line)["response"]["body"].get("usage") or {} for line in answers]
    if not told:
        return None
    read = sum(usage.get("prompt_tokens", usage.get("input_tokens", 0)) for usage in told)
    written = sum(usage.get("completion_tokens", usage.get("output_tokens", 0)) for usage in told)
    return {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}
