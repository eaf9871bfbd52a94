"""Which pages of a pool are free, in use, or kept for whoever brings the same tokens again. No tensor is touched here.

A page that is full is indexed by its tokens and by the page before it, so that a later prompt with the same beginning
finds it, also while the sequence that computed it is still running. A page that nobody uses any more keeps its content
until its room is needed, least recently used first.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_Key = tuple[int, tuple[int, ...]]
_ROOT = 0
_RUN = 8  # tokens in a row that tell one text from others
_MIX = np.random.default_rng(0).integers(2**63, size=_RUN)


class PageAllocator:
    """``num_pages`` pages of ``page_size`` tokens. ``num_evicted`` counts since the start."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_evicted = 0
        self._size = page_size
        self._free = np.ones(num_pages, dtype=bool)
        self._users = [0] * num_pages
        self._index: dict[_Key, int] = {}
        self._keys_of: list[_Key | None] = [None] * num_pages
        self._node_of: list[int] = [_ROOT] * num_pages  # a serial number, so that a reused page is another parent
        self._serials = itertools.count(_ROOT + 1)
        self._unused: OrderedDict[int, None] = OrderedDict()  # indexed pages without users, the least recent first

    @property
    def num_free(self) -> int:
        return int(self._free.sum())

    @property
    def num_kept(self) -> int:
        """Of those without users; they could be evicted."""
        return len(self._unused)

    def match_prefix(self, tokens: Sequence[int], first: int, before: int | None) -> list[int]:
        """The indexed pages with ``tokens`` from ``first`` on behind the page ``before``, which get one more user.

        The last token is left out. Without a ``before`` the pages are those of a beginning.
        """
        pages = []
        parent = self._node(before)
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

    def insert(self, page: int, tokens: Sequence[int], before: int | None) -> int:
        """Lets ``page`` be found by its ``tokens`` behind the page ``before``.

        Returns the page to go on with: another one where the same was computed twice at the same time.
        """
        key = (self._node(before), tuple(tokens))
        known = self._index.get(key)
        if known is None:
            self._index[key], self._keys_of[page], self._node_of[page] = page, key, next(self._serials)
            return page
        if known != page:
            self._retain(known)
            self.release([page])
        return known

    def take(self, count: int) -> list[int] | None:
        """``count`` pages, side by side wherever possible: attention reads neighbours as one. None without room."""
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
        pages: list[int] = chosen.tolist()
        for page in pages:
            self._users[page] = 1
        return pages

    def release(self, pages: list[int]) -> None:
        """One user less; indexed pages stay until their room is needed."""
        # Backwards, so that of one sequence the end is evicted before the beginning it cannot be found without.
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if self._keys_of[page] is None:
                    self._free[page] = True
                else:
                    self._unused[page] = None

    def evict_unused(self) -> None:
        """Evicts every page without users."""
        while self._unused:
            self._evict()

    def forget(self, tokens: Sequence[int]) -> int:
        """Forgets the pages with `_RUN` of ``tokens`` in a row in them, wherever that is, and every page behind one.

        What has users is found by nobody else from now on, and free once they are gone. Returns how many pages were
        forgotten.
        """
        if not self._index:
            return 0
        keys, indexed = zip(*sorted(self._index.items(), key=lambda item: self._node_of[item[1]]), strict=True)
        run = min(_RUN, self._size)
        has_run = np.isin(_runs([own for _, own in keys], run), _runs(tokens, run))
        gone: set[int] = set()
        for key, page, hits in zip(keys, indexed, has_run, strict=True):  # parents first
            if hits.any() or key[0] in gone:
                gone.add(self._node_of[page])
                del self._index[key]
                self._keys_of[page] = None
                if page in self._unused:
                    del self._unused[page]
                    self._free[page] = True
        return len(gone)

    def _node(self, page: int | None) -> int:
        return _ROOT if page is None else self._node_of[page]

    def _gap(self, count: int) -> int | None:
        """Where the first ``count`` free pages in a row begin."""
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
        self._free[page] = True
        self.num_evicted += 1


def _runs(tokens: Sequence[int] | Sequence[Sequence[int]], run: int) -> NDArray[np.int64]:
    """A hash of every ``run`` tokens in a row: [..., n] to [..., n - run + 1]."""
    rows = np.array(tokens, dtype=np.int64)
    last = max(0, rows.shape[-1] - run + 1)
    hashes = np.zeros((*rows.shape[:-1], last), dtype=np.int64)
    for i in range(run):
        hashes += rows[..., i : i + last] * _MIX[i]
    return hashes
