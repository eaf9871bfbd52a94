"""How soon Serve replaces a replica that does not answer."""

from __future__ import annotations

# Three checks in a row must fail, each after its timeout.
HEALTH_CHECK_PERIOD_S = 2.0
HEALTH_CHECK_TIMEOUT_S = 2.0

# For the process that starts Serve's controller. By default Serve stops a replica that failed its checks as gracefully
# as one that is scaled down, and waits for streams that cannot end.
ENVIRONMENT = {"RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1"}
