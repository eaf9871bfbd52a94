"""Which pages of a pool are free, in use, or cached for a later prompt with the same tokens. No tensor is touched here.

A full page is indexed by its tokens and by the page before it. A later prompt with the same beginning finds the page,
even while the sequence that computed it is still running (prefix sharing). A page without users keeps its content until
another sequence needs the room; the least recently used page is evicted first.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_Key = tuple[int, tuple[int, ...]]
_ROOT = 0
_RUN = 8  # tokens in a row that identify a text
_MIX = np.random.default_rng(0).integers(2**63, size=_RUN)


def root_of(salt: str) -> int:
    """The node from which the pages of prompts with ``salt`` hang: no prompt with another salt finds them."""
    return -1 - int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8]) if salt else _ROOT


class PageAllocator:
    """``num_pages`` pages of ``page_size`` tokens, of which ``num_free`` hold nothing.

    ``num_evicted`` counts since the start.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_evicted = 0
        self.num_free = num_pages
        self._size = page_size
        self._free = np.ones(num_pages, dtype=bool)
        self._users = [0] * num_pages
        self._index: dict[_Key, int] = {}
        self._keys_of: list[_Key | None] = [None] * num_pages
        self._node_of: list[int] = [_ROOT] * num_pages  # serial numbers; a reused page gets a new one
        self._serials = itertools.count(_ROOT + 1)
        self._unused: OrderedDict[int, None] = OrderedDict()  # indexed pages without users, the least recent first

    @property
    def num_kept(self) -> int:
        """The number of indexed pages without users; they can be evicted."""
        return len(self._unused)

    def match_prefix(self, tokens: Sequence[int], first: int, before: int | None, root: int = _ROOT) -> list[int]:
        """Finds the indexed pages that hold ``tokens`` from ``first`` on, behind the page ``before``.

        Each page gets one more user. The last token is left out. ``before`` None means that the pages begin a prompt,
        at ``root``.
        """
        pages = []
        parent = self._node(before, root)
        for start in range(first, len(tokens) - self._size, self._size):
            page = self._index.get((parent, tuple(tokens[start : start + self._size])))
            if page is None:
                break
            pages.append(page)
            parent = self._node_of[page]
        for page in pages:
            self._retain(page)
        return pages

    def is_indexed(self, page: int) -> bool:
        return self._keys_of[page] is not None

    def insert(self, page: int, tokens: Sequence[int], before: int | None, root: int = _ROOT) -> int:
        """Indexes ``page`` by its ``tokens`` and the page ``before`` it; the first of a prompt hangs from ``root``.

        Returns the page to continue with. It is another page if two sequences computed the same tokens at the same
        time.
        """
        key = (self._node(before, root), tuple(tokens))
        known = self._index.get(key)
        if known is None:
            self._index[key], self._keys_of[page], self._node_of[page] = page, key, next(self._serials)
            return page
        if known != page:
            self._retain(known)
            self.release([page])
        return known

    def take(self, count: int) -> list[int] | None:
        """Takes ``count`` free pages, side by side wherever possible, because attention reads neighbours in one run.

        Returns None if there is no room.
        """
        if count <= 0:
            return []
        if self.num_free + self.num_kept < count:
            return None
        start = self._gap(count)
        while start is None and self._unused:
            for _ in range(min(count, len(self._unused))):
                self._evict()
            start = self._gap(count)
        chosen = np.flatnonzero(self._free)[:count] if start is None else np.arange(start, start + count)
        self._free[chosen] = False
        self.num_free -= count
        pages: list[int] = chosen.tolist()
        for page in pages:
            self._users[page] = 1
        return pages

    def release(self, pages: list[int]) -> None:
        """Removes one user from each page; indexed pages stay until another sequence needs the room."""
        # Backwards: a page can only be found through the pages before it, so a sequence's end is evicted first.
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if self._keys_of[page] is None:
                    self._set_free(page)
                else:
                    self._unused[page] = None

    def evict_unused(self) -> None:
        """Evicts every page without users."""
        while self._unused:
            self._evict()

    def forget(self, tokens: Sequence[int], root: int = _ROOT) -> int:
        """Forgets every page that holds `_RUN` of ``tokens`` in a row, at any position, and the pages behind it.

        Only pages that hang from ``root`` count.

        No other sequence finds these pages from now on. A page with users becomes free when the last user releases it.
        Returns the number of forgotten pages.
        """
        if not self._index:
            return 0
        keys, indexed = zip(*sorted(self._index.items(), key=lambda item: self._node_of[item[1]]), strict=True)
        run = min(_RUN, self._size)
        has_run = np.isin(_runs([own for _, own in keys], run), _runs(tokens, run))
        gone: set[int] = set()
        below = {root}
        for key, page, hits in zip(keys, indexed, has_run, strict=True):  # parents first
            if key[0] not in below:
                continue
            below.add(self._node_of[page])
            if hits.any() or key[0] in gone:
                gone.add(self._node_of[page])
                del self._index[key]
                self._keys_of[page] = None
                if page in self._unused:
                    del self._unused[page]
                    self._set_free(page)
        return len(gone)

    def _node(self, page: int | None, root: int) -> int:
        return root if page is None else self._node_of[page]

    def _gap(self, count: int) -> int | None:
        """The first of ``count`` free pages in a row; None if there is no such gap."""
        edges = np.flatnonzero(np.diff(np.concatenate(([False], self._free, [False]))))
        starts, ends = edges[::2], edges[1::2]
        long_enough = np.flatnonzero(ends - starts >= count)
        return int(starts[long_enough[0]]) if len(long_enough) else None

    def _retain(self, page: int) -> None:
        self._users[page] += 1
        self._unused.pop(page, None)

    def _evict(self) -> None:
        page, _ = self._unused.popitem(last=False)
        key = self._keys_of[page]
        assert key is not None
        del self._index[key]
        self._keys_of[page] = None
        self._set_free(page)
        self.num_evicted += 1

    def _set_free(self, page: int) -> None:
        self._free[page] = True
        self.num_free += 1


def _runs(tokens: Sequence[int] | Sequence[Sequence[int]], run: int) -> NDArray[np.int64]:
    """A hash of every ``run`` tokens in a row: [..., n] to [..., n - run + 1]."""
    rows = np.array(tokens, dtype=np.int64)
    last = max(0, rows.shape[-1] - run + 1)
    hashes = np.zeros((*rows.shape[:-1], last), dtype=np.int64)
    for i in range(run):
        hashes += rows[..., i : i + last] * _MIX[i]
    return hashes
