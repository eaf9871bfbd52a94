"""Keys and values of all sequences of one model: a pool of pages under a fixed budget, with prefix sharing.

A page holds the keys and values of ``page_size`` consecutive tokens in every layer. Sequences that begin alike share
pages (`rapid.kv_cache.pages`). Shared pages are read-only: a sequence writes only behind the pages that it shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rapid.kv_cache.memory import take_small_pages
from rapid.kv_cache.pages import PageAllocator, root_of
from rapid.kv_cache.stats import PoolStats
from rapid.kv_cache.table import PageTable

INT8_SCALE_BYTES = 4  # beside the integers of a token's key, or value, in one KV head


@dataclass(frozen=True)
class KVLayout:
    """The size of one token: on each layer's device, a key and a value of ``head_dim`` numbers for each KV head.

    ``dtype`` is that of the model: queries, new keys and new values. ``kv_dtype`` is that of stored numbers, if they
    have fewer bits: float8_e4m3fn, or int8 with a scale.
    """

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]
    kv_dtype: torch.dtype | None = None

    @property
    def stored_dtype(self) -> torch.dtype:
        """The type of stored numbers."""
        return self.kv_dtype or self.dtype

    @property
    def slot_size(self) -> int:
        """The numbers of one key, or one value, as they are stored; a scale takes the room of four integers."""
        return self.head_dim + (INT8_SCALE_BYTES if self.stored_dtype == torch.int8 else 0)

    @property
    def num_layers(self) -> int:
        return len(self.devices)

    @property
    def device(self) -> torch.device:
        """The device where a pass begins and ends: it takes tokens and gives logits."""
        return self.devices[0]

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.slot_size * self.stored_dtype.itemsize


class KVPool:
    """``num_pages`` pages of ``page_size`` tokens. Not thread-safe: only the engine's thread uses it.

    For each layer, ``keys`` and ``values`` have a tensor on the layer's device: [KV heads, slots, head size], or
    [slots, KV heads, head size] when ``slot_major`` (the layout that paged kernels read). The head size is the layout's
    ``slot_size``. Token ``i`` of a page is slot
    ``page · page_size + i``. On a CPU the system gives the memory only as pages are written.
    """

    def __init__(self, layout: KVLayout, budget_bytes: int, *, page_size: int = 16, slot_major: bool = False) -> None:
        self.layout, self.page_size, self.slot_major = layout, page_size, slot_major
        self.num_pages = max(1, budget_bytes // (layout.bytes_per_token * page_size))
        slots = (self.num_pages + 1) * page_size  # with a spare page for what padding writes
        heads_and_slots = (slots, layout.num_kv_heads) if slot_major else (layout.num_kv_heads, slots)
        self.keys, self.values = (
            [
                torch.empty(*heads_and_slots, layout.slot_size, dtype=layout.stored_dtype, device=d)
                for d in layout.devices
            ]
            for _ in range(2)
        )
        for rows in (*self.keys, *self.values):
            take_small_pages(rows)
        self._pages = PageAllocator(self.num_pages, page_size)
        self._hits = self._misses = 0

    @property
    def spare_slot(self) -> int:
        """A slot that belongs to no sequence."""
        return self.num_pages * self.page_size

    @property
    def page_bytes(self) -> int:
        return self.layout.bytes_per_token * self.page_size

    def pages_for(self, num_tokens: int) -> int:
        """The number of pages that ``num_tokens`` tokens need."""
        return -(-num_tokens // self.page_size)

    def stats(self) -> PoolStats:
        cached = self._pages.num_kept
        used = self.num_pages - cached - self._pages.num_free
        return PoolStats(
            bytes_total=self.num_pages * self.page_bytes,
            bytes_used=used * self.page_bytes,
            bytes_cached=cached * self.page_bytes,
            hit_tokens=self._hits,
            miss_tokens=self._misses,
            evicted_pages=self._pages.num_evicted,
        )

    def open(self, prompt: Sequence[int], capacity: int, salt: str = "") -> KVCache | None:
        """A cache with room for ``capacity`` tokens, which already holds the indexed beginning of ``prompt``.

        Only caches with the same ``salt`` share pages.

        The prompt's last token never comes from the index: the model must read it to give the first logits. Returns
        None if there is no room now.
        """
        shared = self._pages.match_prefix(prompt, 0, before=None, root=root_of(salt))
        own = self._pages.take(self.pages_for(capacity) - len(shared))
        if own is None:
            self._pages.release(shared)
            return None
        cached = len(shared) * self.page_size
        self._hits += cached
        self._misses += len(prompt) - cached
        return KVCache(self, shared + own, num_shared=len(shared), root=root_of(salt))

    def adopt(self, cache: KVCache, tokens: Sequence[int]) -> None:
        """Replaces pages of ``cache`` that are still empty by pages that another sequence has filled since.

        ``tokens`` are the prompt for which ``cache`` was opened.
        """
        first = cache.length // self.page_size
        if cache.length % self.page_size or first >= len(cache.pages):
            return
        before = cache.pages[first - 1] if first else None
        # The index knows the pages behind a page only if that page is indexed; then it is also the other sequence's.
        if before is not None and not self._pages.is_indexed(before):
            return
        found = self._pages.match_prefix(tokens, cache.length, before, cache.root)
        if found:
            self._pages.release(cache.pages[first : first + len(found)])
            cache.pages[first : first + len(found)] = found
            cache.moved(shared_until=first + len(found))
            gained = len(found) * self.page_size
            self._hits, self._misses = self._hits + gained, self._misses - gained

    def insert(self, cache: KVCache, tokens: Sequence[int], num_tokens: int) -> None:
        """Indexes the full pages among the first ``num_tokens`` tokens of ``cache``, which hold ``tokens``.

        The pages become read-only: while other sequences share them, the cache must not be truncated below them.
        """
        last_shared = cache.pages[cache.num_shared - 1] if cache.num_shared else None
        if last_shared is not None and not self._pages.is_indexed(last_shared):
            return  # the page was forgotten, so no prompt could find the pages behind it
        for i in range(cache.num_shared, min(num_tokens, len(tokens), cache.length) // self.page_size):
            own = tokens[i * self.page_size : (i + 1) * self.page_size]
            cache.pages[i] = self._pages.insert(cache.pages[i], own, cache.pages[i - 1] if i else None, cache.root)
            cache.moved(shared_until=i + 1)

    def close(self, cache: KVCache) -> None:
        """Releases the cache's pages; indexed pages stay until another sequence needs the room."""
        self._pages.release(cache.pages)
        cache.pages = []
        cache.moved(shared_until=0)

    def evict_unused(self) -> None:
        """Evicts every page that no open sequence uses."""
        self._pages.evict_unused()

    def forget(self, tokens: Sequence[int], salt: str = "") -> int:
        """Forgets the cached pages of a text, at any position in a prompt with ``salt`` (`PageAllocator.forget`).

        Returns the number of forgotten pages.
        """
        return self._pages.forget(tokens, root_of(salt))


class KVCache(PageTable):
    """One sequence's pages, all of them. A rollback only sets ``length``."""

    def __init__(self, pool: KVPool, pages: list[int], *, num_shared: int, root: int = 0) -> None:
        super().__init__(pool, pages, num_shared * pool.page_size)
        self.num_shared, self.root = num_shared, root

    def moved(self, *, shared_until: int) -> None:
        """Tells the cache that the pool changed its pages; the first ``shared_until`` pages are shared."""
        self.num_shared = shared_until
        self.length = max(self.length, shared_until * self.pool.page_size)
        self._runs = None

    def truncate(self, length: int) -> None:
        """Rolls back to the first ``length`` tokens; the next write overwrites the rows behind them.

        Raises:
            ValueError: ``length`` cuts into shared pages, which are read-only.
        """
        if length < self.num_shared * self.pool.page_size:
            raise ValueError(f"a rollback to {length} tokens cuts into {self.num_shared} shared pages")
        self.length = min(self.length, length)

    def view(self, chosen: Sequence[int], rest: int, num_ahead: int = 0) -> PageTable:
        """Of the first ``rest`` pages only those at the ``chosen`` indices, and all pages behind them.

        The first ``rest`` pages must be filled. ``num_ahead`` tokens behind the cache's own are there already, from
        earlier passes over a view. What a pass over a view writes lies behind ``length`` of the cache, which does not
        move. So it is never indexed for other prompts (`KVPool.insert`), and the cache's own next pass overwrites it.
        """
        left_out = (rest - len(chosen)) * self.pool.page_size
        pages = [self.pages[i] for i in chosen] + self.pages[rest:]
        return PageTable(self.pool, pages, self.length + num_ahead - left_out, num_left_out=left_out)

    def again(self, start: int) -> PageTable:
        """For a pass that reads the tokens from position ``start`` on again and leaves their keys as they are."""
        return PageTable(self.pool, self.pages, start, num_kept=self.length)
