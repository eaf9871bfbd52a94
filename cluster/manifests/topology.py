"""A service on Kubernetes: its groups of pods, which replicas each holds, and the Serve config that puts them there."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

# A Ray node's label, and what deployments select by. Without it a target would take one GPU of a drafter's four, and
# the drafter that they were meant for would find no pod with room for all of its ranks.
GROUP_LABEL = "rapid/group"

# What passes requests on asks for this much on a cluster, unless the config says more. In the code it asks for nothing,
# and would then be put on the head, which is there to keep the cluster's state and serves no traffic.
LIGHT_CPUS = 0.5

SERVE_PORT = 8000

# Beyond its drain timeout a pod may take this long: for its replacement to start and load a model, while the old
# replica goes on serving, and for Ray to stop.
REPLACEMENT_S = 300


@dataclass(frozen=True)
class Replica:
    """What one replica of a deployment reserves: the bundles of its placement group, or an actor's single one."""

    deployment: str
    bundles: tuple[dict[str, float], ...]
    has_placement_group: bool = False
    num_replicas: int = 1  # where there is no placement group: of the whole service
    drain_timeout_s: float | None = None  # how long a stream through it may still last; None: Serve's own 20 s

    def demand(self, kind: str) -> float:
        """All that it reserves of ``kind``, "CPU" or "GPU"."""
        return sum(bundle.get(kind, 0) for bundle in self.bundles)


@dataclass(frozen=True)
class Group:
    """One kind of worker pod. Each of its pods has room for exactly one replica of every deployment in ``replicas``."""

    name: str
    replicas: tuple[Replica, ...]
    min_pods: int = 1
    max_pods: int = 1

    @property
    def cpus(self) -> int:
        """Whole CPUs of a pod: Ray counts no fractions of a node's."""
        return self._whole("CPU")

    @property
    def gpus(self) -> int:
        """GPUs of a pod."""
        return self._whole("GPU")

    def _whole(self, kind: str) -> int:
        # Rounded first: 0.1 and seven times 0.7 are a little more than 5 in binary.
        return math.ceil(round(sum(replica.demand(kind) for replica in self.replicas), 6))


@dataclass(frozen=True)
class Service:
    """What is served, and the pods that this takes."""

    name: str
    image: str
    ray_version: str
    serve_config: dict[str, Any]  # as `serve run` takes it
    groups: tuple[Group, ...]
    drain_timeout_s: float  # the longest stream
    needs_hub_token: bool = False

    @property
    def grace_s(self) -> int:
        """How long a pod is given to end: longer than any stream that it may carry."""
        return math.ceil(self.drain_timeout_s) + REPLACEMENT_S

    @property
    def can_upgrade_in_steps(self) -> bool:
        """Whether there is a smaller service of the kind: with one replica of each, half of it is all of it."""
        return any(group.max_pods > group.min_pods for group in self.groups)

    def group_of(self, deployment: str) -> str:
        """The name of the group whose pods hold a replica of ``deployment``."""
        return next(group.name for group in self.groups for it in group.replicas if it.deployment == deployment)

    def placed_config(self, qdrant_url: str) -> dict[str, Any]:
        """The Serve config for a cluster of these groups; what it serves stays as it is.

        Every deployment selects its group. Proxies listen on every pod, since the Kubernetes Service sends to all of
        them. The retriever gets the vector store that its replicas share, unless it has one.
        """
        config = copy.deepcopy(self.serve_config)
        config["proxy_location"] = "EveryNode"
        config["http_options"] = {**config.get("http_options", {}), "host": "0.0.0.0", "port": SERVE_PORT}
        application = config["applications"][0]
        application.setdefault("args", {}).setdefault("retriever", {}).setdefault("qdrant_url", qdrant_url)
        said = {deployment["name"]: deployment for deployment in application.get("deployments", [])}
        application["deployments"] = [
            {**said.get(replica.deployment, {}), **_placement(replica, group)}
            for group in self.groups
            for replica in group.replicas
        ]
        return config


def _placement(replica: Replica, group: Group) -> dict[str, Any]:
    selector = {GROUP_LABEL: group.name}
    placement: dict[str, Any] = {"name": replica.deployment}
    if replica.has_placement_group:
        return placement | {
            "placement_group_bundles": [dict(bundle) for bundle in replica.bundles],
            "placement_group_strategy": "STRICT_PACK",
            "placement_group_bundle_label_selector": [selector],
        }
    placement["num_replicas"] = replica.num_replicas
    placement["max_replicas_per_node"] = 1  # two on one pod would go with it together
    if replica.drain_timeout_s is not None:
        placement["graceful_shutdown_timeout_s"] = replica.drain_timeout_s
    placement["ray_actor_options"] = {
        "num_cpus": replica.demand("CPU"),
        "num_gpus": replica.demand("GPU"),
        "label_selector": selector,
    }
    return placement
