"""Pods: the security settings of every container, and the templates of the Ray head and its workers."""

from __future__ import annotations

from typing import Any

from cluster.manifests.topology import SERVE_PORT, Group, Service
from cluster.processes import ENVIRONMENT

USER = 1000  # the image's user
GCS_PORT, DASHBOARD_PORT, AGENT_PORT = 6379, 8265, 52365
# The metrics of the nodes, and on the head those of the autoscaler and the dashboard.
METRICS_PORTS = {"metrics": 8080, "as-metrics": 44217, "dash-metrics": 44227}
HEAD = "head"
MODELS = "/models"
REGISTRY_SECRET = "registry"  # for a private image; with a public one, the Secret may be missing

_GIB_PER_CPU, _GIB_PER_GPU = 4, 48  # weights pass through host memory on their way to a GPU
_OBJECT_STORE_BYTES = 10**9  # prompts and drafts are small; a third of the pod's memory, Ray's default, is not needed
_SHARED_MEMORY_GIB = 2  # for the object store and NCCL's buffers

Json = dict[str, Any]

CONTAINER_SECURITY: Json = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def labels(service: str, component: str | None = None) -> dict[str, str]:
    """The labels of every object of a service; ``component`` tells its pods apart."""
    common = {"app.kubernetes.io/part-of": "rapid", "app.kubernetes.io/instance": service}
    return common | ({"app.kubernetes.io/component": component} if component else {})


def pod_security(user: int = USER) -> Json:
    """The security context of a whole pod. The group gets its volumes; Kubernetes changes only volumes that differ."""
    return {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": user,
        "fsGroup": user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def secret(name: str, key: str, *, optional: bool = False) -> Json:
    """An environment variable's value from a Secret. If an optional one is missing, the variable is not set."""
    return {"secretKeyRef": {"name": name, "key": key} | ({"optional": True} if optional else {})}


def head_template(service: Service) -> Json:
    """The head: it runs the cluster's state and the dashboard, no replica, and serves no traffic."""
    container = _ray_container("ray-head", service) | {
        "ports": [
            {"name": "gcs-server", "containerPort": GCS_PORT},
            {"name": "dashboard", "containerPort": DASHBOARD_PORT},
            {"name": "serve", "containerPort": SERVE_PORT},
            *({"name": name, "containerPort": port} for name, port in METRICS_PORTS.items()),
        ],
        "resources": {"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"memory": "4Gi"}},
        "readinessProbe": _healthz(AGENT_PORT, "/api/healthz", period_s=5, failures=10),
    }
    # The autoscaler beside the head calls Kubernetes' API, so only the head keeps its service account's token.
    return _template(service, HEAD, container, grace_s=120)


def worker_template(service: Service, group: Group) -> Json:
    """A pod with room for one replica of each of the group's deployments."""
    amounts = {"cpu": str(group.cpus), "memory": f"{_memory_gib(group)}Gi"}
    if group.gpus:
        amounts["nvidia.com/gpu"] = str(group.gpus)
    container = _ray_container("ray-worker", service)
    container["env"] += [
        {"name": "RAPID_CACHE", "value": f"{MODELS}/rapid"},
        {"name": "HF_HOME", "value": f"{MODELS}/huggingface"},
        # Without that Secret the service needs no key.
        {"name": "RAPID_API_KEYS", "valueFrom": secret(f"{service.name}-api-keys", "keys", optional=True)},
    ]
    if group.name == service.group_of("Retriever"):
        container["env"].append({"name": "QDRANT_API_KEY", "valueFrom": secret(f"{service.name}-qdrant", "key")})
    if service.needs_hub_token:
        container["env"].append({"name": "HF_TOKEN", "valueFrom": secret("huggingface", "token")})
    container["volumeMounts"].append({"name": "models", "mountPath": MODELS})
    container |= {
        "ports": [
            {"name": "serve", "containerPort": SERVE_PORT},
            {"name": "metrics", "containerPort": METRICS_PORTS["metrics"]},
        ],
        "resources": {"requests": dict(amounts), "limits": amounts},
        # Traffic goes only to pods whose Serve proxy runs and does not drain.
        "readinessProbe": _healthz(SERVE_PORT, "/-/healthz", period_s=5, failures=1),
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/bash", "-c", _drain(service.grace_s)]}}},
    }
    template = _template(service, group.name, container, grace_s=service.grace_s)
    spec = template["spec"]
    spec["automountServiceAccountToken"] = False
    spec["volumes"].append(
        {"name": "models", "persistentVolumeClaim": {"claimName": f"{service.name}-models"}},
    )
    spec["topologySpreadConstraints"] = [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": labels(service.name, group.name)},
        }
    ]
    if group.gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return template


def autoscaler_options() -> Json:
    """The autoscaler's container beside the head, with the same security settings."""
    return {
        "version": "v2",
        "upscalingMode": "Default",
        "idleTimeoutSeconds": 300,
        "imagePullPolicy": "IfNotPresent",
        "resources": {"requests": {"cpu": "200m", "memory": "1Gi"}, "limits": {"memory": "1Gi"}},
        "securityContext": dict(CONTAINER_SECURITY),
        "env": [{"name": "HOME", "value": "/tmp"}],
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }


def _ray_container(name: str, service: Service) -> Json:
    return {
        "name": name,
        "image": service.image,
        "imagePullPolicy": "IfNotPresent",
        "securityContext": dict(CONTAINER_SECURITY),
        "env": [
            {"name": "HOME", "value": "/home/rapid"},
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
            *({"name": name, "value": value} for name, value in ENVIRONMENT.items()),
        ],
        # The root file system is read-only; Ray and the libraries write to these volumes.
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "home", "mountPath": "/home/rapid"},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
        # Ten minutes, because a raylet that waits for a new head is alive.
        "livenessProbe": _healthz(AGENT_PORT, "/api/healthz", period_s=10, failures=60, delay_s=30),
    }


def _template(service: Service, component: str, container: Json, *, grace_s: int) -> Json:
    memory = {"medium": "Memory", "sizeLimit": f"{_SHARED_MEMORY_GIB}Gi"}
    return {
        "metadata": {"labels": labels(service.name, component)},
        "spec": {
            "restartPolicy": "Never",  # the autoscaler replaces pods; a container that restarts in place confuses it
            "terminationGracePeriodSeconds": grace_s,
            "securityContext": pod_security(),
            # Not in a service account, because KubeRay creates the head's.
            "imagePullSecrets": [{"name": REGISTRY_SECRET}],
            "containers": [container],
            "volumes": [
                {"name": "tmp", "emptyDir": {}},
                {"name": "home", "emptyDir": {}},
                {"name": "shared-memory", "emptyDir": memory},
            ],
        },
    }


def ray_start_params() -> dict[str, str]:
    """The start parameters of every Ray node."""
    return {"object-store-memory": str(_OBJECT_STORE_BYTES)}


def _memory_gib(group: Group) -> int:
    return group.gpus * _GIB_PER_GPU if group.gpus else group.cpus * _GIB_PER_CPU


def _healthz(port: int, path: str, *, period_s: int, failures: int, delay_s: int = 10) -> Json:
    return {
        "httpGet": {"port": port, "path": path},
        "initialDelaySeconds": delay_s,
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _drain(grace_s: int) -> str:
    """The command before a worker ends: Serve first replaces its replicas, and ends them after their last streams.

    Ray names each worker process after its actor, so the command waits until no replica and no proxy is left. It also
    stops waiting when the head has been gone for longer than a new head takes, because then no process will end the
    replicas.
    """
    return f"""
timeout 60 ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'the pod ends' \\
  --deadline-remaining-seconds {grace_s - 30} || exit 0
missed=0
while grep -qasE '^ray::(ServeReplica|ProxyActor)' /proc/[0-9]*/cmdline && [ $missed -lt 24 ]; do
  sleep 5
  if timeout 5 bash -c ": < /dev/tcp/$FQ_RAY_IP/{GCS_PORT}"; then missed=0; else missed=$((missed + 1)); fi
done
""".strip()
