"""A service on Kubernetes: its groups of pods, their replicas, and the Serve config that places the replicas there."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

# Deployments select Ray nodes by this label. Without it a target could use one GPU of a drafter's pod with four, and
# the drafter would find no pod with room for all of its ranks.
GROUP_LABEL = "rapid/group"

# CPUs of a deployment that only passes requests on, unless the config sets more. In the code it asks for none, so Ray
# could place it on the head, which runs the cluster's state and serves no traffic.
LIGHT_CPUS = 0.5

SERVE_PORT = 8000

# A pod may take this much longer than its drain timeout: its replacement starts and loads a model, while the old
# replica still serves; then Ray stops.
REPLACEMENT_S = 300


@dataclass(frozen=True)
class Replica:
    """The reservation of one replica of a deployment: its placement group's bundles, or an actor's single bundle."""

    deployment: str
    bundles: tuple[dict[str, float], ...]
    has_placement_group: bool = False
    num_replicas: int = 1  # of the whole service, if there is no placement group
    drain_timeout_s: float | None = None  # for streams that are open; None: Serve's own 20 s

    def demand(self, kind: str) -> float:
        """The sum of its reservations of ``kind``, "CPU" or "GPU"."""
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
        """Whole CPUs of a pod: Ray does not count fractions of a node's CPUs."""
        return self._whole("CPU")

    @property
    def gpus(self) -> int:
        """GPUs of a pod."""
        return self._whole("GPU")

    def _whole(self, kind: str) -> int:
        # Rounded first: 0.1 and seven times 0.7 add up to a little more than 5 in binary.
        return math.ceil(round(sum(replica.demand(kind) for replica in self.replicas), 6))


@dataclass(frozen=True)
class Service:
    """The served application, and the pods that it needs."""

    name: str
    image: str
    ray_version: str
    serve_config: dict[str, Any]  # in the form of `serve run`
    groups: tuple[Group, ...]
    drain_timeout_s: float  # the longest stream
    needs_hub_token: bool = False

    @property
    def grace_s(self) -> int:
        """Seconds that a pod has to end: longer than any stream that it may carry."""
        return math.ceil(self.drain_timeout_s) + REPLACEMENT_S

    @property
    def can_upgrade_in_steps(self) -> bool:
        """Whether a smaller service of this kind exists: with one replica of each, half of the service is all of it."""
        return any(group.max_pods > group.min_pods for group in self.groups)

    def group_of(self, deployment: str) -> str:
        """The name of the group whose pods hold a replica of ``deployment``."""
        return next(group.name for group in self.groups for it in group.replicas if it.deployment == deployment)

    def placed_config(self, qdrant_url: str) -> dict[str, Any]:
        """The Serve config for a cluster of these groups; it serves the same application.

        Every deployment selects its group. Proxies listen on every pod, since the Kubernetes Service sends to all pods.
        The retriever gets the vector store that its replicas share, unless the config names another.
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
    placement["max_replicas_per_node"] = 1  # a lost pod then costs one replica
    if replica.drain_timeout_s is not None:
        placement["graceful_shutdown_timeout_s"] = replica.drain_timeout_s
    placement["ray_actor_options"] = {
        "num_cpus": replica.demand("CPU"),
        "num_gpus": replica.demand("GPU"),
        "label_selector": selector,
    }
    return placement
