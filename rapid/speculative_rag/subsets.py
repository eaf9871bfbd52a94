"""Which passages each draft reads: one of each cluster of the passages (Speculative RAG, arXiv 2407.08223 §3.2).

Nothing is random here: the same passages give the same subsets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MAX_ITERATIONS = 100


def k_means(vectors: NDArray[np.float32], num_clusters: int) -> NDArray[np.int64]:
    """The cluster of each of ``vectors`` [n, d], numbered in order of their first vectors; at most ``num_clusters``.

    The first centre is the first vector, each further one the vector farthest from all centres so far.
    """
    centres = vectors[:1]
    while len(centres) < num_clusters and (distances := _distances(vectors, centres).min(1)).max() > 0:
        centres = np.concatenate([centres, vectors[[distances.argmax()]]])
    nearest = _distances(vectors, centres).argmin(1)
    for _ in range(_MAX_ITERATIONS):
        present = np.unique(nearest)  # a cluster may lose all of its vectors
        centres = np.stack([vectors[nearest == cluster].mean(0) for cluster in present])
        before, nearest = nearest, _distances(vectors, centres).argmin(1)
        if np.array_equal(before, nearest):
            break
    _, first, numbered = np.unique(nearest, return_index=True, return_inverse=True)
    order: NDArray[np.int64] = first.argsort().argsort()
    return order[numbered]


def subsets(clusters: Sequence[int], num_subsets: int) -> list[tuple[int, ...]]:
    """Up to ``num_subsets`` different choices of one passage of each cluster, as indices in ascending order.

    ``clusters[i]`` is the cluster of passage i, the best passage first. The choices first go down the clusters side by
    side, so that as many passages as possible are read; then one cluster's passages are shifted against another's.
    """
    members = [[i for i, of in enumerate(clusters) if of == cluster] for cluster in sorted(set(clusters))]
    longest = max(map(len, members), default=0)
    turns = ((shift, row) for shift in range(longest) for row in range(longest))
    chosen = (
        tuple(sorted(group[(row + shift * place) % len(group)] for place, group in enumerate(members)))
        for shift, row in turns
    )
    return list(dict.fromkeys(chosen))[:num_subsets]


def _distances(vectors: NDArray[np.float32], centres: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared distances [n, number of centres]."""
    squares: NDArray[np.float32] = ((vectors[:, None] - centres) ** 2).sum(-1)
    return squares
