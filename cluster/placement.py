"""The placement group of an engine replica."""

from __future__ import annotations

# The replica itself only hands out leases, and needs almost no CPU. A bundle may not be empty, so it is not zero.
REPLICA_CPUS = 0.1


def engine_bundles(*, num_cpus: float, num_gpus: float, num_ranks: int = 1) -> list[dict[str, float]]:
    """Bundle 0 holds the Serve replica, each other bundle a rank of its engine; all are on one node (STRICT_PACK)."""
    rank = {kind: amount for kind, amount in {"CPU": num_cpus, "GPU": num_gpus}.items() if amount}
    return [{"CPU": REPLICA_CPUS}, *(dict(rank) for _ in range(num_ranks))]
