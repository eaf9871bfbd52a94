"""The checks of KubeRay's operator beyond its CRDs, as far as a RayService of this project could violate them.

Each function is one rule; the name in brackets is the check in KubeRay 1.7's `utils/validation.go` that it follows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

Json = dict[str, Any]

_MAX_NAME = 47  # the operator adds a hyphen and five characters for the cluster, whose name may have 53
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_PREFIX = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
_GATED = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}


def violations(service: Json) -> list[str]:
    """The operator's objections to a RayService that satisfies the CRD."""
    return [message for rule in RULES for message in rule(service)]


def name(service: Json) -> Iterator[str]:
    """The name must leave room for the cluster's name, and be a DNS label. [ValidateRayServiceMetadata]"""
    given = service["metadata"]["name"]
    if len(given) > _MAX_NAME:
        yield f"name {given!r} is longer than {_MAX_NAME} characters"
    if not _DNS_1035.fullmatch(given):
        yield f"name {given!r} is not a DNS-1035 label"


def containers(service: Json) -> Iterator[str]:
    """Every group has at least one container. [ValidateRayClusterSpec]"""
    for group, spec in _groups(service):
        if not spec["template"]["spec"].get("containers"):
            yield f"group {group} has no container"


def resources_said_once(service: Json) -> Iterator[str]:
    """Resources are start parameters or fields of the group, not both. [validateRayGroupResources]"""
    for group, spec in _groups(service):
        if spec.get("resources") and any(spec.get("rayStartParams", {}).get(key) for key in _RESOURCE_PARAMS):
            yield f"group {group} has resources in rayStartParams and beside them"


def group_labels(service: Json) -> Iterator[str]:
    """Labels follow Kubernetes' syntax, and are not a start parameter. [validateRayGroupLabels]"""
    for group, spec in _groups(service):
        if "labels" in spec.get("rayStartParams", {}):
            yield f"group {group} has labels in rayStartParams"
        for key, value in spec.get("labels", {}).items():
            prefix, slash, last = key.rpartition("/")
            if not _LABEL_NAME.fullmatch(last) or (slash and not _LABEL_PREFIX.fullmatch(prefix)):
                yield f"group {group}: {key!r} is no label key"
            if value and not _LABEL_NAME.fullmatch(value):
                yield f"group {group}: {value!r} is no label value"


def replica_bounds(service: Json) -> Iterator[str]:
    """The bounds are not negative and in order. [ValidateRayClusterSpec]"""
    for spec in _workers(service):
        least, most = spec.get("minReplicas", 0), spec.get("maxReplicas", 2**31 - 1)
        if not 0 <= least <= most:
            yield f"group {spec['groupName']}: minReplicas {least} and maxReplicas {most}"


def idle_timeouts(service: Json) -> Iterator[str]:
    """Timeouts are not negative; a group's own timeout needs autoscaler v2.

    [validateWorkerGroupIdleTimeout, ValidateRayClusterSpec]
    """
    cluster = _cluster(service)
    if cluster.get("autoscalerOptions", {}).get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds is negative"
    for spec in _workers(service):
        if spec.get("idleTimeoutSeconds", 0) < 0:
            yield f"group {spec['groupName']}: idleTimeoutSeconds is negative"
        if "idleTimeoutSeconds" in spec and not _has_autoscaler_v2(cluster):
            yield f"group {spec['groupName']}: idleTimeoutSeconds needs autoscaler v2"


def autoscaler(service: Json) -> Iterator[str]:
    """Only one field chooses the autoscaler's version, and the operator sets its command.

    No group is suspended. With v2 no pod restarts in place.
    [ValidateRayClusterSpec]
    """
    cluster = _cluster(service)
    options = cluster.get("autoscalerOptions", {})
    if "KUBERAY_GEN_AUTOSCALER_START_CMD" in _names(options.get("env", ())):
        yield "autoscalerOptions.env sets KUBERAY_GEN_AUTOSCALER_START_CMD, which is the operator's"
    if not cluster.get("enableInTreeAutoscaling"):
        return
    if "version" in options and "RAY_enable_autoscaler_v2" in _head_env(service):
        yield "the autoscaler's version is set twice: as an option and in the head's RAY_enable_autoscaler_v2"
    for group, spec in _groups(service):
        if spec.get("suspend"):
            yield f"group {group} cannot be suspended beside an autoscaler"
        restarts = spec["template"]["spec"].get("restartPolicy", "Never")
        if _has_autoscaler_v2(cluster) and restarts != "Never":
            yield f"group {group}: restartPolicy is {restarts}, but autoscaler v2 wants Never"


def gcs_fault_tolerance(service: Json) -> Iterator[str]:
    """Only gcsFaultToleranceOptions sets it, not annotations, the head's environment or start parameters.

    With Redis there is no storage option.

    [ValidateRayClusterSpec, validateGcsFaultToleranceBackend]
    """
    options, env = _cluster(service).get("gcsFaultToleranceOptions"), _head_env(service)
    params = _cluster(service)["headGroupSpec"].get("rayStartParams", {})
    if params.get("redis-username") or "REDIS_USERNAME" in env:
        yield "the Redis user name belongs into gcsFaultToleranceOptions"
    if options is None:
        if "RAY_REDIS_ADDRESS" in env:
            yield "RAY_REDIS_ADDRESS is set without gcsFaultToleranceOptions"
        return
    annotations = service["metadata"].get("annotations", {})
    for key in ("ray.io/ft-enabled", "ray.io/external-storage-namespace"):
        if annotations.get(key):
            yield f"the annotation {key} is set beside gcsFaultToleranceOptions"
    for variable in ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS"):
        if variable in env:
            yield f"the head's {variable} is set beside gcsFaultToleranceOptions"
    if params.get("redis-password"):
        yield "redis-password is set in rayStartParams beside gcsFaultToleranceOptions"
    if options.get("backend", "redis") == "redis" and "storage" in options:
        yield "gcsFaultToleranceOptions.storage is not for Redis"


def authentication(service: Json) -> Iterator[str]:
    """Tokens need Ray 2.52, and a RayService cannot use Kubernetes' tokens.

    [ValidateRayClusterSpec, ValidateRayServiceSpec]
    """
    options = _cluster(service).get("authOptions", {})
    if options.get("enableK8sTokenAuth"):
        yield "a RayService does not support Kubernetes' tokens"
    if options.get("mode") == "token":
        version = re.match(r"(\d+)\.(\d+)", _cluster(service).get("rayVersion", ""))
        if not version or (int(version[1]), int(version[2])) < (2, 52):
            yield "authOptions.mode token needs a rayVersion of 2.52 or newer"


def feature_gates(service: Json) -> Iterator[str]:
    """Features that need an open feature gate of the operator. [ValidateRayClusterSpec]"""
    for field, gate in _GATED.items():
        if field in _cluster(service):
            yield f"{field} needs the feature gate {gate}"


def head_service(service: Json) -> Iterator[str]:
    """The operator chooses the name of the head's service. [ValidateRayServiceSpec]"""
    if _cluster(service)["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        yield "headGroupSpec.headService must have no name"


def upgrades(service: Json) -> Iterator[str]:
    """The upgrade strategy is a known one; in steps it needs an autoscaler, a gateway and valid steps.

    [ValidateRayServiceSpec, ValidateClusterUpgradeOptions]
    """
    spec = service["spec"]
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "rayClusterDeletionDelaySeconds is negative"
    strategy = spec.get("upgradeStrategy", {})
    kind = strategy.get("type", "NewCluster")
    if kind not in ("NewClusterWithIncrementalUpgrade", "NewCluster", "None"):
        yield f"upgradeStrategy.type {kind} is unknown"
    if kind != "NewClusterWithIncrementalUpgrade":
        return
    if not _cluster(service).get("enableInTreeAutoscaling"):
        yield "an incremental upgrade needs the autoscaler"
    options = strategy.get("clusterUpgradeOptions")
    if options is None:
        yield "an incremental upgrade needs clusterUpgradeOptions"
        return
    surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent", -1)
    if not 0 <= step <= surge <= 100:
        yield f"0 ≤ stepSizePercent ≤ maxSurgePercent ≤ 100 must hold, got {step} and {surge}"
    if options.get("intervalSeconds", 0) <= 0:
        yield "intervalSeconds must be above 0"
    if not options.get("gatewayClassName"):
        yield "gatewayClassName is missing"


RULES: tuple[Callable[[Json], Iterator[str]], ...] = (
    name,
    containers,
    resources_said_once,
    group_labels,
    replica_bounds,
    idle_timeouts,
    autoscaler,
    gcs_fault_tolerance,
    authentication,
    feature_gates,
    head_service,
    upgrades,
)


def _cluster(service: Json) -> Json:
    cluster: Json = service["spec"]["rayClusterConfig"]
    return cluster


def _workers(service: Json) -> list[Json]:
    workers: list[Json] = _cluster(service).get("workerGroupSpecs", [])
    return workers


def _groups(service: Json) -> Iterator[tuple[str, Json]]:
    yield "head", _cluster(service)["headGroupSpec"]
    for spec in _workers(service):
        yield spec["groupName"], spec


def _has_autoscaler_v2(cluster: Json) -> bool:
    return bool(cluster.get("autoscalerOptions", {}).get("version") == "v2")


def _head_env(service: Json) -> set[str]:
    found = _cluster(service)["headGroupSpec"]["template"]["spec"].get("containers") or [{}]
    return _names(found[0].get("env", ()))


def _names(variables: Any) -> set[str]:
    return {variable["name"] for variable in variables}
