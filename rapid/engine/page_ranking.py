"""Which of a sequence's own pages a draft over a view reads: those of a window, or those that a query looks for.

All layers and heads read the same pages, because a pass has one page table for each sequence. The papers choose for
each layer and KV head.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rapid.engine.messages import CacheView
from rapid.engine.readout import Download
from rapid.engine.sequence import ForwardRequest, Sequence, Task
from rapid.kernels.stored_keys import stored_keys
from rapid.kv_cache.pool import KVCache
from rapid.kv_cache.table import PageTable

NUM_QUERIES = {"window": 0, "snap": 32, "chunks": 1}  # of the prompt's end, by which its pages are ranked


def rank_pages(sequence: Sequence, kind: str) -> Task[list[int]]:
    """The prompt's pages, the worthiest first; the pages that its last queries stand in are not among them.

    Page 0 holds the attention sinks and is always the first. Then, by ``kind``:

    * window: the latest first
    * snap: by the attention of the last 32 queries, summed over queries, heads and layers (SnapKV, arXiv 2404.14469).
      The sum over a page takes the place of the paper's pooling over 5 tokens.
    * chunks: by the last query's attention over the mean key of each page (TriForce, arXiv 2404.11912)

    The ranking goes by the prompt as it was first sent, so that an engine which continues an output ranks alike.
    """
    if sequence.ranking is not None:
        return sequence.ranking
    cache, end = sequence.cache, len(sequence.prompt) - sequence.written
    start = max(0, end - NUM_QUERIES[kind])
    num_pages = max(1, start // cache.pool.page_size)
    if kind == "window" or num_pages == 1:
        order = list(range(num_pages - 1, 0, -1))
    else:
        scores = _PageScores(cache, num_pages, by_mean_key=kind == "chunks")
        yield ForwardRequest(sequence, sequence.prompt[start:end], 0, cache.again(start), scores.watch)
        found = yield Download(scores.total)
        order = (np.argsort(-found[1:], kind="stable") + 1).tolist()
    sequence.ranking = [0, *order]
    return sequence.ranking


def view_of(cache: KVCache, ranking: list[int], view: CacheView, num_ahead: int) -> PageTable:
    """The pages of ``cache`` that a draft reads next; ``num_ahead`` of its tokens are behind the cache's end.

    They are ``view.num_tokens`` in whole pages, but at least the first page and the last one. The latest pages, from
    the prompt's end on, come before those of the ranking; so the view slides as the output grows.
    """
    size = cache.pool.page_size
    budget = max(2, view.num_tokens // size)
    num_pages = (cache.length + num_ahead) // size + 1  # with the one that the next token is written to
    if num_pages <= budget:
        return cache.view([], 0, num_ahead)
    num_latest = min(num_pages - len(ranking), budget - 1)
    return cache.view(sorted(ranking[: budget - num_latest]), num_pages - num_latest, num_ahead)


class _PageScores:
    """Scores the first ``num_pages`` pages of ``cache``; ``total`` (float64 [num_pages]) is the sum of all layers."""

    def __init__(self, cache: KVCache, num_pages: int, *, by_mean_key: bool) -> None:
        self._pool, self._by_mean_key = cache.pool, by_mean_key
        self._pages = torch.tensor(cache.pages[:num_pages])
        self.total = torch.zeros(num_pages, dtype=torch.float64, device=cache.pool.layout.device)

    def watch(self, layer: int, query: Tensor, scaling: float) -> None:
        """Adds the scores of ``query`` [n, heads, d] in ``layer``."""
        num_heads = self._pool.layout.num_kv_heads
        for head, rows in enumerate(query.unflatten(1, (num_heads, -1)).unbind(1)):
            keys = stored_keys(self._pool, layer, head, self._pages)  # [pages, page size, d]
            keys = keys.mean(1, keepdim=True) if self._by_mean_key else keys
            weights = (rows.flatten(0, 1).float() @ keys.flatten(0, 1).T * scaling).softmax(-1)
            self.total += weights.sum(0).unflatten(0, (len(keys), -1)).sum(-1).to(self.total)
