"""Replicas from which this process leases nothing for some seconds: their engines seem to hang.

Serve copies the router's own module into its processes by value. What the router shares with them stands here.
"""

import time

AVOID_S = 10.0
_avoided: dict[str, float] = {}  # by replica: until when


def avoid(replica: str) -> None:
    """For some seconds leases go to other replicas than ``replica``, if there are any.

    Serve would prefer it: what was given up there makes it look the least busy.
    """
    now = time.monotonic()
    for name in [name for name, until in _avoided.items() if until < now]:
        del _avoided[name]
    _avoided[replica] = now + AVOID_S


def trust(replica: str) -> None:
    """Its engine answers."""
    _avoided.pop(replica, None)


def is_avoided(replica: str) -> bool:
    return _avoided.get(replica, 0.0) > time.monotonic()
