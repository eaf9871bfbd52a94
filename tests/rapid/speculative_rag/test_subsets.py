"""k-means and the subsets, against cases that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rapid.speculative_rag.subsets import k_means, subsets


def clusters(points: list[list[float]], num_clusters: int) -> list[int]:
    return k_means(np.array(points, np.float32), num_clusters).tolist()


def test_two_heaps_are_told_apart() -> None:
    assert clusters([[0, 0], [10, 10], [0, 1], [10, 11], [1, 0]], 2) == [0, 1, 0, 1, 0]


def test_centres_move_until_nothing_changes() -> None:
    """Worked out by hand. The first centres are 0 and 10, so that 4 belongs to 0 and 6 to 10. The means are then 4/3
    and 32/4 = 8: 4 stays, since 8/3 < 4. With 4.8 in the place of 4 the means are 1.6 and 8, and 4.8 lies in between;
    with 4.9 it moves, and the means become 0 and 7.38."""
    assert clusters([[0], [0], [4], [6], [8], [8], [10]], 2) == [0, 0, 0, 1, 1, 1, 1]
    assert clusters([[0], [0], [4.9], [6], [8], [8], [10]], 2) == [0, 0, 1, 1, 1, 1, 1]


def test_clusters_are_numbered_as_they_first_come_and_there_are_no_more_than_different_points() -> None:
    assert clusters([[5], [0], [5], [0]], 2) == [0, 1, 0, 1]
    assert clusters([[5], [5], [5]], 3) == [0, 0, 0]
    assert clusters([[1], [2]], 5) == [0, 1]
    assert clusters([[1]], 2) == [0]


@pytest.mark.parametrize("seed", range(20))
def test_each_point_is_nearest_to_its_own_mean(seed: int) -> None:
    """The condition on which Lloyd's iterations end."""
    points = np.random.default_rng(seed).normal(size=(12, 4)).astype(np.float32)
    of = k_means(points, 3)
    means = np.stack([points[of == cluster].mean(0) for cluster in range(of.max() + 1)])
    distances = np.linalg.norm(points[:, None] - means, axis=-1)
    assert (distances.argmin(1) == of).all()
    assert [int(np.flatnonzero(of == cluster)[0]) for cluster in range(of.max() + 1)] == sorted(
        int(np.flatnonzero(of == cluster)[0]) for cluster in range(of.max() + 1)
    )


def test_each_subset_has_one_passage_of_each_cluster_and_all_passages_come_first() -> None:
    assert subsets([0, 1, 0, 1, 0, 1, 0, 1, 0, 1], 5) == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert subsets([0, 0, 0, 1], 5) == [(0, 3), (1, 3), (2, 3)]  # there are no more
    assert subsets([0, 1, 0, 1], 5) == [(0, 1), (2, 3), (0, 3), (1, 2)]
    assert subsets([0, 1, 1, 2], 9) == [(0, 1, 3), (0, 2, 3)]
    assert subsets([0, 0], 5) == [(0,), (1,)]
    assert subsets([], 5) == []
