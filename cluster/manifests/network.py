"""Which pods may send to which. Everything else is refused, in both directions."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.manifests.pods import AGENT_PORT, DASHBOARD_PORT, HEAD, METRICS_PORTS, Json, labels
from cluster.manifests.stores import QDRANT, QDRANT_PORT, REDIS, REDIS_PORT
from cluster.manifests.topology import SERVE_PORT

OPERATOR_NAMESPACE, MONITORING_NAMESPACE = "kuberay-system", "monitoring"
# A namespace whose pods may send requests carries this label.
CLIENTS_LABEL = {"rapid/clients": "true"}

_DNS, _HTTPS = 53, 443
_KUBERNETES_API = (6443, 8443)  # behind its Service, whose port is 443; the second is minikube's


def policies(service: str, ray_components: Sequence[str], retriever: str) -> list[Json]:
    """The network policies of a service; ``retriever`` is the component whose pods hold a retriever.

    Ray pods may send to each other on any port, since Ray chooses the ports. Requests may come from labelled namespaces
    and from the service's own gateway; the operator may reach the dashboard, and Prometheus the metrics. Outgoing
    traffic is limited to DNS, the two stores, Kubernetes' API (for the autoscaler), and HTTPS (for model files). Only
    the head may reach Redis, and so may KubeRay's job that cleans up after the head and carries its labels. Only the
    retriever may reach Qdrant.
    """
    ray = {
        "matchLabels": labels(service),
        "matchExpressions": [_in("app.kubernetes.io/component", ray_components)],
    }
    ray_pods = {"podSelector": ray}
    gateway = {"podSelector": {"matchLabels": {"gateway.networking.k8s.io/gateway-name": f"{service}-gateway"}}}
    ingress = [
        {"from": [ray_pods]},
        {"from": [{"namespaceSelector": {"matchLabels": dict(CLIENTS_LABEL)}}, gateway], "ports": _tcp(SERVE_PORT)},
        {"from": [_namespace(OPERATOR_NAMESPACE)], "ports": _tcp(DASHBOARD_PORT, AGENT_PORT, SERVE_PORT)},
        {"from": [_namespace(MONITORING_NAMESPACE)], "ports": _tcp(*METRICS_PORTS.values())},
    ]
    egress = [
        {"to": [ray_pods]},
        {"to": [_pods(service, QDRANT)], "ports": _tcp(QDRANT_PORT)},
        {"to": [_pods(service, REDIS)], "ports": _tcp(REDIS_PORT)},
        {"to": [_namespace("kube-system")], "ports": [{"protocol": "UDP", "port": _DNS}, *_tcp(_DNS)]},
        {"ports": _tcp(_HTTPS, *_KUBERNETES_API)},
    ]
    return [
        _policy(f"{service}-default-deny", service, {"matchLabels": labels(service)}, [], []),
        _policy(f"{service}-ray", service, ray, ingress, egress),
        *(
            _policy(
                f"{service}-{component}",
                service,
                {"matchLabels": labels(service, component)},
                [{"from": [_pods(service, user)], "ports": _tcp(port)}],
                [],
            )
            for component, port, user in ((QDRANT, QDRANT_PORT, retriever), (REDIS, REDIS_PORT, HEAD))
        ),
    ]


def _policy(name: str, service: str, selector: Json, ingress: list[Json], egress: list[Json]) -> Json:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "labels": labels(service)},
        "spec": {
            "podSelector": selector,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": ingress,
            "egress": egress,
        },
    }


def _in(key: str, values: Sequence[str]) -> Json:
    return {"key": key, "operator": "In", "values": list(values)}


def _pods(service: str, component: str) -> Json:
    return {"podSelector": {"matchLabels": labels(service, component)}}


def _namespace(name: str) -> Json:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _tcp(*ports: int) -> list[Json]:
    return [{"protocol": "TCP", "port": port} for port in ports]
