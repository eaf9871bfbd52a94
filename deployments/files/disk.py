"""Files that several processes write: each is whole at every moment, and one process at a time holds a lock."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Writes ``data`` beside ``path`` and renames it, so that no process reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{uuid.uuid4().hex}")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of ``folder`` for the block. The system frees the lock of a dead process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
