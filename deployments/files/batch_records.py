"""What is known of a batch, and what is asked of those who keep batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from rapid.errors import RapidError

UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")


class BatchNotStored(RapidError):
    """The batch is absent, or belongs to another tenant."""

    _code = "batch_not_found"
    _status = 404


class BatchTaken(RapidError):
    """Another process answers the batch now."""

    _code = "batch_taken"
    _status = 409


@dataclass
class Record:
    """One batch, OpenAI's object. The limits of ``client`` count; ``runner`` was last heard of at ``heard_at``."""

    batch: dict[str, Any]
    tenant: str
    client: str
    output_expires_s: int | None = None
    runner: str = ""
    heard_at: float = 0.0

    @property
    def id(self) -> str:
        return str(self.batch["id"])

    @property
    def is_unfinished(self) -> bool:
        return self.batch["status"] in UNFINISHED

    def move(self, status: str) -> None:
        self.batch |= {"status": status, f"{status}_at": int(time.time())}


class Claim(NamedTuple):
    """The batch that a process is to answer next, if any, and whether there are unfinished ones at all."""

    record: Record | None
    are_any_left: bool


class Batches(Protocol):
    """`StoredBatches`, or those of another process."""

    async def create(self, tenant: str, client: str, asked: dict[str, Any]) -> dict[str, Any]: ...
    async def get(self, tenant: str, batch_id: str) -> dict[str, Any]: ...
    async def list_batches(self, tenant: str) -> list[dict[str, Any]]: ...
    async def cancel(self, tenant: str, batch_id: str) -> dict[str, Any]: ...
    async def claim(self, runner: str) -> Claim: ...
    async def begin(self, claimed: Record, total: int) -> set[str]: ...
    async def add_answer(self, claimed: Record, line: str) -> None: ...
    async def beat(self, claimed: Record) -> str: ...
    async def finish(self, claimed: Record, status: str, errors: Sequence[dict[str, Any]] = ()) -> None: ...
