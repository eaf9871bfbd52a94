"""Statistics of a pool of keys and values. This module does not import torch, so processes without it can read it."""

from __future__ import annotations

from typing import NamedTuple


class PoolStats(NamedTuple):
    """Bytes and counts since the start. ``bytes_used`` belong to open sequences; ``bytes_cached`` can be evicted.

    Of the prompts' tokens, ``hit_tokens`` were found in the pool and ``miss_tokens`` had to be computed.
    """

    bytes_total: int
    bytes_used: int
    bytes_cached: int
    hit_tokens: int
    miss_tokens: int
    evicted_pages: int
