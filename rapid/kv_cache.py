"""Keys and values of all sequences of one model: a pool of pages under a fixed budget, with shared prefixes.

A page holds the keys and values of ``page_size`` consecutive tokens in every layer. A page that is full is indexed by
its tokens and by the page before it, so that a later prompt with the same beginning finds it, also while the sequence
that computed it is still running. Shared pages are never written again: a sequence only ever writes behind what it
shares. A page that nobody uses any more keeps its content until its room is needed, least recently used first.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from rapid.memory import take_small_pages


@dataclass(frozen=True)
class KVLayout:
    """What one token occupies: 2 × ``num_kv_heads`` × ``head_dim`` numbers of ``dtype`` on each layer's device."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]

    @property
    def num_layers(self) -> int:
        return len(self.devices)

    @property
    def device(self) -> torch.device:
        """Where a pass begins and ends: tokens go in and logits come out there."""
        return self.devices[0]

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class PoolStats(NamedTuple):
    """Bytes and counts since the start. ``bytes_used`` belong to open sequences; ``bytes_cached`` could be evicted.

    ``hit_tokens`` were found when prompts came in, ``miss_tokens`` had to be computed.
    """

    bytes_total: int
    bytes_used: int
    bytes_cached: int
    hit_tokens: int
    miss_tokens: int
    evicted_pages: int


_Key = tuple[int, tuple[int, ...]]
_ROOT = 0


class KVPool:
    """``num_pages`` pages of ``page_size`` tokens. Not thread-safe: the engine's thread owns it.

    ``keys`` and ``values`` have for each layer, on its device, [KV heads, slots, head size], or [slots, KV heads, head
    size] when ``slot_major`` (what paged kernels read); token ``i`` of a page is slot ``page · page_size + i``. On a
    CPU the memory is only taken from the system as pages are written.
    """

    def __init__(self, layout: KVLayout, budget_bytes: int, *, page_size: int = 16, slot_major: bool = False) -> None:
        self.layout, self.page_size = layout, page_size
        self.num_pages = max(1, budget_bytes // (layout.bytes_per_token * page_size))
        slots = (self.num_pages + 1) * page_size  # and a spare page, which padding may write to
        heads_and_slots = (slots, layout.num_kv_heads) if slot_major else (layout.num_kv_heads, slots)
        self.keys, self.values = (
            [torch.empty(*heads_and_slots, layout.head_dim, dtype=layout.dtype, device=d) for d in layout.devices]
            for _ in range(2)
        )
        for rows in (*self.keys, *self.values):
            take_small_pages(rows)
        self._free = np.ones(self.num_pages, dtype=bool)
        self._users = [0] * self.num_pages
        self._index: dict[_Key, int] = {}
        self._keys_of: list[_Key | None] = [None] * self.num_pages
        self._node_of: list[int] = [_ROOT] * self.num_pages  # a serial number, so that a reused page is another parent
        self._serials = itertools.count(_ROOT + 1)
        self._unused: OrderedDict[int, None] = OrderedDict()  # indexed pages without users, the least recent first
        self._hits = self._misses = self._evicted = 0

    @property
    def spare_slot(self) -> int:
        """A slot of no sequence."""
        return self.num_pages * self.page_size

    @property
    def page_bytes(self) -> int:
        return self.layout.bytes_per_token * self.page_size

    def pages_for(self, num_tokens: int) -> int:
        """How many pages ``num_tokens`` tokens take."""
        return -(-num_tokens // self.page_size)

    def stats(self) -> PoolStats:
        cached, free = len(self._unused), int(self._free.sum())
        used = self.num_pages - cached - free
        return PoolStats(
            bytes_total=self.num_pages * self.page_bytes,
            bytes_used=used * self.page_bytes,
            bytes_cached=cached * self.page_bytes,
            hit_tokens=self._hits,
            miss_tokens=self._misses,
            evicted_pages=self._evicted,
        )

    def open(self, prompt: Sequence[int], capacity: int) -> KVCache | None:
        """A cache with room for ``capacity`` tokens, already holding what is known of ``prompt``.

        The prompt's last token is never taken from the index: feeding it is what gives the first logits. Returns None
        when there is no room now.
        """
        shared = self._match(prompt, 0, parent=_ROOT)
        for page in shared:
            self._retain(page)
        own = self._allocate(self.pages_for(capacity) - len(shared))
        if own is None:
            self._release(shared)
            return None
        cached = len(shared) * self.page_size
        self._hits += cached
        self._misses += len(prompt) - cached
        return KVCache(self, shared + own, num_shared=len(shared))

    def adopt(self, cache: KVCache, tokens: Sequence[int]) -> None:
        """Replaces pages that ``cache`` has yet to fill with ``tokens`` by ones another sequence has filled since."""
        first = cache.length // self.page_size
        if cache.length % self.page_size or first >= len(cache.pages):
            return
        # The parent is known only if the page before is indexed, and then it is the same as the other sequence's.
        if first and self._keys_of[cache.pages[first - 1]] is None:
            return
        parent = self._node_of[cache.pages[first - 1]] if first else _ROOT
        found = self._match(tokens, cache.length, parent)
        if found:
            for page in found:
                self._retain(page)
            self._release(cache.pages[first : first + len(found)])
            cache.pages[first : first + len(found)] = found
            cache.moved(shared_until=first + len(found))
            gained = len(found) * self.page_size
            self._hits, self._misses = self._hits + gained, self._misses - gained

    def index(self, cache: KVCache, tokens: Sequence[int], num_tokens: int) -> None:
        """Lets others find the full pages among the first ``num_tokens`` of ``cache``, which hold ``tokens``.

        They become read-only: the cache must not be truncated below them while they are shared.
        """
        parent = self._node_of[cache.pages[cache.num_shared - 1]] if cache.num_shared else _ROOT
        for i in range(cache.num_shared, min(num_tokens, len(tokens), cache.length) // self.page_size):
            key = (parent, tuple(tokens[i * self.page_size : (i + 1) * self.page_size]))
            known = self._index.get(key)
            if known is None:
                page = cache.pages[i]
                self._index[key], self._keys_of[page], self._node_of[page] = page, key, next(self._serials)
            elif known != cache.pages[i]:  # computed twice at the same time: go on with the copy that can be found
                self._retain(known)
                self._release([cache.pages[i]])
                cache.pages[i] = known
            parent = self._node_of[cache.pages[i]]
            cache.moved(shared_until=i + 1)

    def close(self, cache: KVCache) -> None:
        """Gives the pages back; indexed ones stay until their room is needed."""
        self._release(cache.pages)
        cache.pages = []
        cache.moved(shared_until=0)

    def forget(self) -> None:
        """Drops every page that no open sequence uses."""
        while self._unused:
            self._evict()

    def _match(self, tokens: Sequence[int], first: int, parent: int) -> list[int]:
        """The indexed pages that continue ``parent`` with ``tokens`` from ``first`` on, the last token left out."""
        pages = []
        for start in range(first, len(tokens) - self.page_size, self.page_size):
            page = self._index.get((parent, tuple(tokens[start : start + self.page_size])))
            if page is None:
                break
            pages.append(page)
            parent = self._node_of[page]
        return pages

    def _allocate(self, count: int) -> list[int] | None:
        """``count`` pages, side by side wherever possible: attention reads neighbours as one."""
        if count <= 0:
            return []
        if int(self._free.sum()) + len(self._unused) < count:
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

    def _gap(self, count: int) -> int | None:
        """Where the first ``count`` free pages in a row begin."""
        edges = np.flatnonzero(np.diff(np.concatenate(([False], self._free, [False]))))
        starts, ends = edges[::2], edges[1::2]
        long_enough = np.flatnonzero(ends - starts >= count)
        return int(starts[long_enough[0]]) if len(long_enough) else None

    def _retain(self, page: int) -> None:
        self._users[page] += 1
        self._unused.pop(page, None)

    def _release(self, pages: list[int]) -> None:
        # Backwards, so that of one sequence the end is evicted before the beginning it cannot be found without.
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if self._keys_of[page] is None:
                    self._free[page] = True
                else:
                    self._unused[page] = None

    def _evict(self) -> None:
        page, _ = self._unused.popitem(last=False)
        key = self._keys_of[page]
        assert key is not None
        del self._index[key]
        self._keys_of[page] = None
        self._free[page] = True
        self._evicted += 1


class KVCache:
    """One sequence's pages, of which the first ``length`` tokens are filled.

    A forward pass first writes each layer's new rows behind ``length``, then moves ``length`` once (``advance``), so an
    interrupted pass leaves the cache as it was. Rolling back is setting a length.
    """

    def __init__(self, pool: KVPool, pages: list[int], *, num_shared: int) -> None:
        self.pool, self.pages, self.num_shared = pool, pages, num_shared
        self.length = num_shared * pool.page_size
        self._runs: list[tuple[int, int]] | None = None

    @classmethod
    def at(cls, pool: KVPool, pages: list[int], length: int) -> KVCache:
        """Pages of ``pool`` that were given out elsewhere, the first ``length`` tokens of which are filled."""
        cache = cls(pool, pages, num_shared=0)
        cache.length = length
        return cache

    @property
    def capacity(self) -> int:
        return len(self.pages) * self.pool.page_size

    def moved(self, *, shared_until: int) -> None:
        """The pages were changed by the pool, and the first ``shared_until`` of them are not the sequence's own."""
        self.num_shared = shared_until
        self.length = max(self.length, shared_until * self.pool.page_size)
        self._runs = None

    def runs(self, end: int) -> list[tuple[int, int]]:
        """The slots of tokens 0 to ``end`` as (first, past the last) intervals, neighbours joined."""
        size = self.pool.page_size
        if self._runs is None:
            breaks = np.flatnonzero(np.diff(self.pages) != 1) + 1
            starts, ends = np.concatenate(([0], breaks)), np.concatenate((breaks, [len(self.pages)]))
            self._runs = [
                (self.pages[a] * size, (self.pages[b - 1] + 1) * size) for a, b in zip(starts, ends, strict=True)
            ]
        cut, position = [], 0
        for first, last in self._runs:
            if position >= end:
                break
            cut.append((first, min(last, first + end - position)))
            position += last - first
        return cut

    def slots(self, num_tokens: int) -> list[int]:
        """The slots of the next ``num_tokens`` tokens.

        Raises:
            ValueError: they do not fit.
        """
        end, size = self.length + num_tokens, self.pool.page_size
        if end > self.capacity:
            raise ValueError(f"a cache for {self.capacity} tokens cannot hold {end}")
        return [self.pages[i // size] * size + i % size for i in range(self.length, end)]

    def advance(self, num_tokens: int) -> None:
        """Counts ``num_tokens`` written rows as filled."""
        self.length += num_tokens

    def truncate(self, length: int) -> None:
        """Rolls back to the first ``length`` tokens; what lay behind them is overwritten by the next write.

        Raises:
            ValueError: that would cut into shared pages, which are never written again.
        """
        if length < self.num_shared * self.pool.page_size:
            raise ValueError(f"a rollback to {length} tokens cuts into {self.num_shared} shared pages")
        self.length = min(self.length, length)
