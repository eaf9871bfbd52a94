"""What Kubernetes and KubeRay say to the manifests, asked offline; and that the asking finds what is wrong."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from kube import ROOT, documents, every, of_kind, ray_service

from cluster.manifests.crd import Crds
from cluster.manifests.rules import violations
from deployments.cli.manifests import problems

CRDS = ROOT.parent / "shared" / "kuberay"


@pytest.fixture(scope="module")
def crds() -> Crds:
    if not CRDS.is_dir():
        pytest.skip(f"{CRDS} is absent")
    return Crds(CRDS)


@every
def test_the_schemas_and_the_rules_hold(name: str, crds: Crds) -> None:
    assert problems((ROOT / "cluster" / "kuberay" / f"{name}.yaml").read_text(), crds) == []


@every
def test_without_the_schemas_the_rules_hold_alone(name: str) -> None:
    assert problems((ROOT / "cluster" / "kuberay" / f"{name}.yaml").read_text(), None) == []


def test_everything_but_two_kinds_has_a_schema(crds: Crds) -> None:
    assert {it["kind"] for it in documents("cpu-demo") if not crds.covers(it)} == {"PodDisruptionBudget", "PodMonitor"}


def test_defaults_are_filled_in(crds: Crds) -> None:
    service = ray_service("cpu-demo")
    del service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplicas"]
    filled, wrong = crds.validate(service)
    assert not wrong
    assert filled["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplicas"] == 0
    assert "minReplicas" not in service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spec", "upgradeStrategie"), {}, "spec: .*upgradeStrategie"),
        (("spec", "rayClusterConfig", "autoscalerOptions", "version"), "v3", "autoscalerOptions.version: "),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "maxReplicas"), "eight", "maxReplicas: .*integer"),
        (("spec", "rayClusterConfig", "headGroupSpec", "template"), None, "headGroupSpec: .*template"),
        (("spec", "rayClusterDeletionDelaySeconds"), -1, "rayClusterDeletionDelaySeconds: .*minimum"),
    ],
)
def test_the_schema_refuses(path: tuple[Any, ...], value: Any, message: str, crds: Crds) -> None:
    service = ray_service("cpu-demo")
    put(service, path, value)
    assert re.search(message, "; ".join(crds.validate(service)[1]))


def test_a_number_or_a_text_may_stand_where_the_schema_says_so(crds: Crds) -> None:
    service = ray_service("llama-8b")
    where = ("spec", "rayClusterConfig", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources")
    for amount, is_right in ((1, True), ("1500m", True), ("lots", False), (1.5, False)):
        put(service, (*where, "limits", "cpu"), amount)
        assert (crds.validate(service)[1] == []) == is_right, amount


def test_the_parts_of_other_kinds_are_checked(crds: Crds) -> None:
    store = of_kind("cpu-demo", "StatefulSet")[0]
    put(store, ("spec", "template", "spec", "containers", 0, "readinesProbe"), {})
    assert "readinesProbe" in crds.validate(store)[1][0]
    policy = of_kind("cpu-demo", "NetworkPolicy")[1]
    put(policy, ("spec", "ingress", 0, "from", 0, "podSelektor"), {})
    assert "podSelektor" in crds.validate(policy)[1][0]


BROKEN: list[tuple[str, tuple[Any, ...], Any, str]] = [
    ("name", ("metadata", "name"), "a" * 48, "longer than 47"),
    ("label", ("metadata", "name"), "8b", "DNS-1035"),
    ("containers", ("workers", 0, "template", "spec", "containers"), [], "no container"),
    ("twice", ("head", "resources"), {"CPU": "1"}, "beside them"),
    ("start label", ("head", "rayStartParams", "labels"), "a=b", "labels in rayStartParams"),
    ("label key", ("workers", 0, "labels"), {"a/b/c": "d"}, "no label key"),
    ("label value", ("workers", 0, "labels"), {"a": "b c"}, "no label value"),
    ("bounds", ("workers", 0, "minReplicas"), 9, "minReplicas 9"),
    ("idle", ("workers", 0, "idleTimeoutSeconds"), -1, "negative"),
    ("all idle", ("cluster", "autoscalerOptions", "idleTimeoutSeconds"), -1, "negative"),
    ("v1", ("cluster", "autoscalerOptions", "version"), "v1", "needs autoscaler v2"),
    ("both", ("head", "template", "spec", "containers", 0, "env"), "RAY_enable_autoscaler_v2", "set twice"),
    ("command", ("cluster", "autoscalerOptions", "env"), "KUBERAY_GEN_AUTOSCALER_START_CMD", "operator's"),
    ("restart", ("head", "template", "spec", "restartPolicy"), "Always", "wants Never"),
    ("suspend", ("workers", 0, "suspend"), True, "cannot be suspended"),
    ("annotation", ("metadata", "annotations"), {"ray.io/ft-enabled": "true"}, "beside gcsFaultToleranceOptions"),
    ("user", ("head", "template", "spec", "containers", 0, "env"), "REDIS_USERNAME", "user name"),
    ("password", ("head", "template", "spec", "containers", 0, "env"), "REDIS_PASSWORD", "REDIS_PASSWORD"),
    ("start password", ("head", "rayStartParams", "redis-password"), "x", "redis-password"),
    ("storage", ("cluster", "gcsFaultToleranceOptions", "storage"), {}, "not for Redis"),
    ("old Ray", ("cluster", "rayVersion"), "2.51.0", "2.52"),
    ("Kubernetes' tokens", ("cluster", "authOptions", "enableK8sTokenAuth"), True, "does not support"),
    ("gate", ("cluster", "networkPolicy"), {}, "RayClusterNetworkPolicy"),
    ("head service", ("head", "headService"), {"metadata": {"name": "x"}}, "must have no name"),
    ("way", ("spec", "upgradeStrategy", "type"), "Rolling", "unknown"),
    ("delay", ("spec", "rayClusterDeletionDelaySeconds"), -1, "negative"),
    ("step", ("spec", "upgradeStrategy", "clusterUpgradeOptions", "stepSizePercent"), 30, "stepSizePercent"),
    ("interval", ("spec", "upgradeStrategy", "clusterUpgradeOptions", "intervalSeconds"), 0, "intervalSeconds"),
    ("gateway", ("spec", "upgradeStrategy", "clusterUpgradeOptions", "gatewayClassName"), "", "gatewayClassName"),
    ("no options", ("spec", "upgradeStrategy", "clusterUpgradeOptions"), None, "clusterUpgradeOptions"),
    ("no autoscaler", ("cluster", "enableInTreeAutoscaling"), False, "needs the autoscaler"),
]


@pytest.mark.parametrize(("path", "value", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_rule_is_named(path: tuple[Any, ...], value: Any, message: str) -> None:
    service = copy.deepcopy(ray_service("llama-8b-70b"))
    long = {
        "cluster": ("spec", "rayClusterConfig"),
        "head": ("spec", "rayClusterConfig", "headGroupSpec"),
        "workers": ("spec", "rayClusterConfig", "workerGroupSpecs"),
    }
    if path[-1] == "env":
        value = [{"name": value, "value": "1"}]
    put(service, (*long.get(path[0], path[:1]), *path[1:]), value)
    assert message in "; ".join(violations(service))


def test_redis_without_its_options_is_a_broken_rule() -> None:
    service = ray_service("cpu-demo")
    put(service, ("spec", "rayClusterConfig", "gcsFaultToleranceOptions"), None)
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    head["env"].append({"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"})
    assert violations(service) == ["RAY_REDIS_ADDRESS is set without gcsFaultToleranceOptions"]


def put(document: Any, path: tuple[Any, ...], value: Any) -> None:
    """Sets what is at ``path``; None takes it away."""
    for step in path[:-1]:
        document = document[step]
    if value is None:
        del document[path[-1]]
    else:
        document[path[-1]] = value
