"""How what is stored is written: beside its place, and renamed, so that no process reads half of it."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Puts ``data`` at ``path``, in the place of what may be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path.parent, data) as written:
        os.replace(written, path)


@contextmanager
def unfinished(folder: Path, data: bytes) -> Iterator[Path]:
    """A file in ``folder`` with ``data``, for the block to rename; one that is left there at the end is removed.

    Raises:
        FileNotFoundError: the folder is not there.
    """
    path = folder / f".{uuid.uuid4().hex}"
    try:
        path.write_bytes(data)
        yield path
    finally:
        path.unlink(missing_ok=True)
