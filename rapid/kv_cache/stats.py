"""What a pool of keys and values holds, in numbers. Processes without torch read them."""

from __future__ import annotations

from typing import NamedTuple


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
