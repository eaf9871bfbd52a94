"""The two stores beside a Ray cluster: Qdrant for vectors, Redis for the head's state. One pod and one volume each."""

from __future__ import annotations

from cluster.manifests.pods import CONTAINER_SECURITY, Json, labels, pod_security, secret

QDRANT_IMAGE = "qdrant/qdrant:v1.20.0"
REDIS_IMAGE = "redis:8.2.10-bookworm"
QDRANT, REDIS = "qdrant", "redis"
QDRANT_PORT, REDIS_PORT = 6333, 6379

_QDRANT_USER, _REDIS_USER = 1000, 999  # the Redis image creates its user


def qdrant(service: str) -> list[Json]:
    """Qdrant, with its vectors on a volume. Its only other write is a file that marks the first start."""
    container = {
        "name": QDRANT,
        "image": QDRANT_IMAGE,
        "securityContext": dict(CONTAINER_SECURITY),
        "env": [
            {"name": "QDRANT_INIT_FILE_PATH", "value": "/qdrant/init/.qdrant-initialized"},
            {"name": "QDRANT__TELEMETRY_DISABLED", "value": "true"},
            {"name": "QDRANT__SERVICE__API_KEY", "valueFrom": secret(f"{service}-qdrant", "key")},
        ],
        "ports": [{"name": "http", "containerPort": QDRANT_PORT}],
        "resources": {"requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"memory": "2Gi"}},
        "readinessProbe": {"httpGet": {"path": "/readyz", "port": "http"}, "periodSeconds": 5},
        "livenessProbe": {"httpGet": {"path": "/livez", "port": "http"}, "periodSeconds": 10, "failureThreshold": 6},
        "volumeMounts": [
            {"name": "data", "mountPath": "/qdrant/storage", "subPath": "storage"},
            {"name": "data", "mountPath": "/qdrant/snapshots", "subPath": "snapshots"},
            {"name": "init", "mountPath": "/qdrant/init"},
        ],
    }
    return _store(service, QDRANT, QDRANT_PORT, container, user=_QDRANT_USER, scratch="init", size_gib=20)


def redis(service: str) -> list[Json]:
    """Redis, which stores the state that a new Ray head needs after the old one died, on a volume."""
    password = {"valueFrom": secret(f"{service}-redis", "password")}
    container = {
        "name": REDIS,
        "image": REDIS_IMAGE,
        "securityContext": dict(CONTAINER_SECURITY),
        "command": ["/bin/sh", "-c"],
        # Every process of the pod's machine may read arguments, so the password comes on standard input.
        "args": [
            "exec redis-server --dir /data --appendonly yes --appendfsync always - <<END\n"
            'requirepass "$REDIS_PASSWORD"\nEND\n'
        ],
        # redis-cli reads the second variable.
        "env": [{"name": "REDIS_PASSWORD", **password}, {"name": "REDISCLI_AUTH", **password}],
        "ports": [{"name": "redis", "containerPort": REDIS_PORT}],
        "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "512Mi"}},
        # redis-cli also exits with 0 when Redis refuses the password, or is still loading.
        "readinessProbe": {
            "exec": {"command": ["/bin/sh", "-c", "redis-cli ping | grep -qx PONG"]},
            "periodSeconds": 5,
            "timeoutSeconds": 3,
        },
        "livenessProbe": {"tcpSocket": {"port": "redis"}, "periodSeconds": 10, "failureThreshold": 6},
        "volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "tmp", "mountPath": "/tmp"}],
    }
    return _store(service, REDIS, REDIS_PORT, container, user=_REDIS_USER, scratch="tmp", size_gib=2)


def _store(
    service: str, component: str, port: int, container: Json, *, user: int, scratch: str, size_gib: int
) -> list[Json]:
    name, own = f"{service}-{component}", labels(service, component)
    claim = {
        "metadata": {"name": "data", "labels": own},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": f"{size_gib}Gi"}}},
    }
    pod = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 60,
        "securityContext": pod_security(user),
        "containers": [container],
        "volumes": [{"name": scratch, "emptyDir": {}}],
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "labels": own},
            "spec": {
                "clusterIP": "None",  # one pod: its name is its address
                "selector": own,
                "ports": [{"name": component, "port": port, "targetPort": port}],
            },
        },
        {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": {"name": name, "labels": own},
            "spec": {
                "serviceName": name,
                "replicas": 1,
                "selector": {"matchLabels": own},
                "template": {"metadata": {"labels": own}, "spec": pod},
                "volumeClaimTemplates": [claim],
            },
        },
    ]
