"""How much the vectors that requests leave in the store may take, and how long they stay."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retrieval.errors import RetrievalError

MAX_KEPT_MB, KEPT_FOR_S = 64.0, 86_400.0
_BYTES_A_NUMBER = 4
_BYTES_A_NAMESPACE = 4096  # of the store's own, so that many small ones are bounded, too
_WAIT_S = 5.0  # for another process that writes


class KeptVectors:
    """A list of the namespaces that requests keep: whose they are, how large, and when they were used.

    One client's may take `max_mb`; those that it has not used for longest go first. All go that were not used for
    `max_age_s`. With a `folder` the list outlives this process, as the vectors do. Several threads may call it. Every
    method raises RetrievalError when the list cannot be read or written.
    """

    def __init__(
        self, folder: Path | None = None, *, max_mb: float = MAX_KEPT_MB, max_age_s: float = KEPT_FOR_S
    ) -> None:
        self._folder, self._max_bytes, self._max_age_s = folder, max_mb * 1e6, max_age_s
        self._lock = threading.Lock()
        self._opened: sqlite3.Connection | None = None

    def reserve(self, namespace: str, client: str, num_numbers: int) -> list[str] | None:
        """Note a namespace before its vectors, of `num_numbers` numbers together, are written.

        Returns the namespaces that must be deleted for it and then released, or None when it is larger than all that
        the client may keep.
        """
        size = _BYTES_A_NAMESPACE + num_numbers * _BYTES_A_NUMBER
        if size > self._max_bytes:
            return None
        now = time.time()
        with self._writing() as db:
            rows = db.execute("SELECT namespace FROM kept WHERE used < ?", (now - self._max_age_s,))
            old = [name for (name,) in rows if name != namespace]
            left = self._max_bytes - size
            # The latest first: what no longer fits behind them is the oldest.
            for name, bytes_ in db.execute(
                "SELECT namespace, bytes FROM kept WHERE client = ? ORDER BY used DESC", (client,)
            ):
                if name != namespace and name not in old:
                    left -= bytes_
                    if left < 0:
                        old.append(name)
            db.execute("REPLACE INTO kept VALUES (?, ?, ?, ?)", (namespace, client, size, now))
        return old

    def use(self, namespace: str) -> None:
        """Note that a namespace is used, if a request keeps it."""
        with self._writing() as db:
            db.execute("UPDATE kept SET used = ? WHERE namespace = ?", (time.time(), namespace))

    def release(self, namespace: str) -> None:
        """Forget a namespace: it is deleted, or kept for something else than a request."""
        with self._writing() as db:
            db.execute("DELETE FROM kept WHERE namespace = ?", (namespace,))

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._lock, self._connection() as db:  # which commits, or rolls back
                yield db
        except (sqlite3.Error, OSError) as error:
            raise RetrievalError(f"the list of kept vectors cannot be used: {error}. Check the folder.") from error

    def _connection(self) -> sqlite3.Connection:
        if self._opened is None:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            place = ":memory:" if self._folder is None else str(self._folder / "kept.sqlite")
            self._opened = sqlite3.connect(place, timeout=_WAIT_S, check_same_thread=False)
            self._opened.execute(
                "CREATE TABLE IF NOT EXISTS kept (namespace TEXT PRIMARY KEY, client TEXT, bytes INTEGER, used REAL)"
            )
        return self._opened
