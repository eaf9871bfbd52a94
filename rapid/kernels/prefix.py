"""Which sequences of a pass share their first pages: attention then reads the keys and values of those pages once.

The queries of all these sequences attend over the shared pages together, and each sequence's own queries over the rest
of its pages. Both results are combined by their sums of exponentials, which is exact: cascade attention, as in
FlashInfer (Ye et al. 2025, arXiv 2501.01005).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class PrefixGroup(NamedTuple):
    """Neighbours in a batch, the sequences from ``first`` to before ``end``, and how many first pages they share.

    ``num_pages`` is 0 for a sequence without a group.
    """

    first: int
    end: int
    num_pages: int


def prefix_groups(pages: Sequence[Sequence[int]], unit: int = 1) -> list[PrefixGroup]:
    """All sequences, in the groups that save the most reads; ``pages`` are the pages that each sequence only reads.

    A group's pages are a multiple of ``unit``. Only neighbours form a group (`rapid.engine.scheduler.schedule` puts
    sequences that share pages side by side).
    """
    shared = [_common(one, other) // unit * unit for one, other in pairwise(pages)]
    # Of the first n sequences: how many reads of a page their best groups save, and the last of these groups.
    saved, last = [0], [PrefixGroup(0, 0, 0)]
    for end in range(1, len(pages) + 1):
        most, group = saved[-1], PrefixGroup(end - 1, end, 0)
        num_pages = len(pages[end - 1])
        for first in range(end - 2, -1, -1):
            num_pages = min(num_pages, shared[first])
            if num_pages == 0:
                break
            if saved[first] + (end - first - 1) * num_pages > most:
                most, group = saved[first] + (end - first - 1) * num_pages, PrefixGroup(first, end, num_pages)
        saved.append(most)
        last.append(group)
    groups, end = [], len(pages)
    while end:
        groups.append(last[end])
        end = last[end].first
    return groups[::-1]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first elements are equal."""
    if not one or not other or one[0] != other[0]:
        return 0
    return bisect_left(range(1, min(len(one), len(other)) + 1), True, key=lambda n: one[:n] != other[:n])
