"""The number of replicas that an engine needs: by open leases, and by KV memory in use."""

from __future__ import annotations

import math
from typing import Any

KV_SHARE = "kv_share"  # a replica's metric: the share of its KV memory that open sequences hold


class LeasePolicy:
    """A Ray Serve autoscaling policy; Serve applies the bounds and delays of its configuration around it.

    The policy computes two needs, and the larger one decides. One is the leases that are open or wait, at
    ``target_ongoing_requests`` a replica. The other is KV memory, since a few long documents can fill a replica that
    has few leases. Without any lease the policy asks for zero replicas, if the bounds allow it.
    """

    def __init__(self, target_kv_share: float) -> None:
        self._target_kv_share = target_kv_share

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """(wanted replicas, an empty state) from Serve's `AutoscalingContext`."""
        leases = context.total_num_requests
        shares = (context.aggregated_metrics or {}).get(KV_SHARE, {})
        by_leases = leases / context.config.get_target_ongoing_requests()
        by_memory = sum(shares.values()) / self._target_kv_share if leases else 0.0
        # Rounding errors of averages must not start a replica.
        return math.ceil(max(by_leases, by_memory) - 1e-3), {}
