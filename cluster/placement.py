"""The placement group of an engine replica."""

from __future__ import annotations

# What the replica itself needs: it only hands out leases. Bundles may not be empty, so it is not nothing.
REPLICA_CPUS = 0.1


def engine_bundles(*, num_cpus: float, num_gpus: float) -> list[dict[str, float]]:
    """Bundle 0 holds the Serve replica, bundle 1 its engine actor. Both belong on one node (STRICT_PACK)."""
    engine = {"CPU": num_cpus, "GPU": num_gpus}
    return [{"CPU": REPLICA_CPUS}, {kind: amount for kind, amount in engine.items() if amount}]
