"""How many replicas there should be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cluster.scaling import KV_SHARE, LeasePolicy


def wanted(leases: float, shares: dict[str, float]) -> int:
    config = SimpleNamespace(get_target_ongoing_requests=lambda: 4.0)
    context = SimpleNamespace(total_num_requests=leases, aggregated_metrics={KV_SHARE: shares}, config=config)
    return LeasePolicy(0.8)(context)[0]


@pytest.mark.parametrize(("leases", "replicas"), [(0, 0), (1, 1), (4, 1), (4.0001, 1), (5, 2), (12, 3)])
def test_replicas_follow_leases(leases: float, replicas: int) -> None:
    assert wanted(leases, {"a": 0.1}) == replicas


def test_a_few_long_documents_ask_for_memory() -> None:
    assert wanted(2, {"a": 0.9}) == 2
    assert wanted(2, {"a": 0.9, "b": 0.8}) == 3


def test_memory_that_nobody_uses_any_more_keeps_no_replica() -> None:
    assert wanted(0, {"a": 0.5}) == 0


def test_a_replica_that_has_told_nothing_yet_counts_as_empty() -> None:
    context = SimpleNamespace(
        total_num_requests=1, aggregated_metrics=None, config=SimpleNamespace(get_target_ongoing_requests=lambda: 4.0)
    )
    assert LeasePolicy(0.8)(context) == (1, {})
