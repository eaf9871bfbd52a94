"""The Kubernetes objects of a service, as plain data, for KubeRay 1.7."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import yaml

from cluster.manifests.network import policies
from cluster.manifests.pods import (
    HEAD,
    METRICS_PORTS,
    Json,
    autoscaler_options,
    head_template,
    labels,
    ray_start_params,
    secret,
    worker_template,
)
from cluster.manifests.stores import QDRANT, QDRANT_PORT, REDIS, REDIS_PORT, qdrant, redis
from cluster.manifests.topology import GROUP_LABEL, Service

_MIN_CACHE_GIB, _CACHE_GIB_PER_GPU = 10, 60  # at most, bfloat16 weights fill most of an 80 GB GPU
_UPGRADE_PERCENT, _UPGRADE_INTERVAL_S = 25, 60


def manifests(service: Service) -> list[Json]:
    """All objects of ``service``, in an order in which references point backwards. kubectl chooses their namespace.

    The objects refer to five Secrets that are not among them: ``<name>-redis`` (password), ``<name>-qdrant`` (key),
    ``huggingface`` (token), and two optional ones, ``<name>-api-keys`` (keys) and ``registry``.
    """
    return [
        _model_cache(service),
        *qdrant(service.name),
        *redis(service.name),
        *policies(service.name, [HEAD, *(group.name for group in service.groups)], service.group_of("Retriever")),
        *_disruption_budgets(service),
        _pod_monitor(service),
        ray_service(service),
    ]


def ray_service(service: Service) -> Json:
    """The RayService."""
    config = service.placed_config(f"http://{service.name}-{QDRANT}:{QDRANT_PORT}")
    serve_config = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)
    head = head_template(service)
    # KubeRay applies a changed Serve config to the running cluster, where Serve restarts every replica in place. A
    # change of the cluster's own spec is an upgrade instead: the old cluster serves until the new one is ready.
    head["metadata"]["annotations"] = {"rapid/serve-config": hashlib.sha256(serve_config.encode()).hexdigest()[:16]}
    cluster = {
        "rayVersion": service.ray_version,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": autoscaler_options(),
        "gcsFaultToleranceOptions": {
            "redisAddress": f"{service.name}-{REDIS}:{REDIS_PORT}",
            "redisPassword": {"valueFrom": secret(f"{service.name}-redis", "password")},
        },
        "headGroupSpec": {
            "rayStartParams": {
                "num-cpus": "0",
                "num-gpus": "0",
                "dashboard-host": "0.0.0.0",
                **ray_start_params(),
            },
            "template": head,
        },
        "workerGroupSpecs": [
            {
                "groupName": group.name,
                "replicas": group.min_pods,
                "minReplicas": group.min_pods,
                "maxReplicas": group.max_pods,
                "idleTimeoutSeconds": 300,
                "labels": {GROUP_LABEL: group.name},
                "rayStartParams": ray_start_params(),
                "template": worker_template(service, group),
            }
            for group in service.groups
        ],
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": service.name, "labels": labels(service.name)},
        "spec": {
            "excludeHeadPodFromServeSvc": True,
            "rayClusterDeletionDelaySeconds": service.grace_s,
            "upgradeStrategy": _upgrade_strategy(service),
            "serveConfigV2": serve_config,
            "rayClusterConfig": cluster,
        },
    }


def _upgrade_strategy(service: Service) -> Json:
    if not service.can_upgrade_in_steps:
        return {"type": "NewCluster"}
    return {
        "type": "NewClusterWithIncrementalUpgrade",
        "clusterUpgradeOptions": {
            "gatewayClassName": "istio",
            "maxSurgePercent": _UPGRADE_PERCENT,
            "stepSizePercent": _UPGRADE_PERCENT,
            "intervalSeconds": _UPGRADE_INTERVAL_S,
        },
    }


def _model_cache(service: Service) -> Json:
    size_gib = max(_MIN_CACHE_GIB, _CACHE_GIB_PER_GPU * sum(group.gpus for group in service.groups))
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": f"{service.name}-models", "labels": labels(service.name)},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": f"{size_gib}Gi"}}},
    }


def _disruption_budgets(service: Service) -> list[Json]:
    """One budget per kind of pod that the service needs.

    Of several pods Kubernetes may evict one at a time; it may not evict a single pod. The budgets are counts and not
    shares: Kubernetes computes shares only for kinds that it can scale.
    """
    workers = {group.name: max(1, group.min_pods - 1) for group in service.groups if group.min_pods}
    least = {HEAD: 1, **workers, QDRANT: 1, REDIS: 1}
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": f"{service.name}-{component}", "labels": labels(service.name)},
            "spec": {
                "minAvailable": count,
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
                "selector": {"matchLabels": labels(service.name, component)},
            },
        }
        for component, count in least.items()
    ]


def _pod_monitor(service: Service) -> Json:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": service.name, "labels": labels(service.name)},
        "spec": {
            "selector": {
                "matchLabels": labels(service.name),
                "matchExpressions": [{"key": "ray.io/node-type", "operator": "In", "values": ["head", "worker"]}],
            },
            "podMetricsEndpoints": [{"port": name, "interval": "15s"} for name in METRICS_PORTS],
        },
    }


class _Dumper(yaml.SafeDumper):
    """Writes no aliases, which readers of manifests do not expect, and texts of several lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def to_yaml(objects: Iterable[Json]) -> str:
    """The objects as one YAML file."""
    dumped: str = yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return dumped
