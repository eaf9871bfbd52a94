"""What a pod may do, who may talk to it, where secrets come from, and the image that it runs."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

from kube import ROOT, Json, cluster, every, of_kind, pod_templates, ray_service, served

from cluster.manifests.topology import GROUP_LABEL
from deployments.cli.manifests import read_service


@every
def test_every_container_is_locked_down(name: str) -> None:
    contexts = [cluster(name)["autoscalerOptions"]["securityContext"]]
    for template in pod_templates(name).values():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        contexts += [container["securityContext"] for container in spec["containers"]]
    for context in contexts:
        assert context["runAsNonRoot"] and context["readOnlyRootFilesystem"]
        assert context["allowPrivilegeEscalation"] is False and context["capabilities"] == {"drop": ["ALL"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}


@every
def test_no_secret_is_written_down(name: str) -> None:
    """No Secret object, and every variable that sounds like one refers to a Secret."""
    assert not of_kind(name, "Secret")
    for template in pod_templates(name).values():
        for container in template["spec"]["containers"]:
            for variable in container.get("env", ()):
                if re.search("TOKEN|PASSWORD|AUTH|KEY|SECRET", variable["name"]):
                    assert set(variable) == {"name", "valueFrom"}
    assert "api_key" not in ray_service(name)["spec"]["serveConfigV2"]


@every
def test_the_hub_token_is_there_where_a_model_comes_from_the_hub(name: str) -> None:
    workers = [template for component, template in pod_templates(name).items() if component in ("target", "drafter")]
    for template in workers:
        names = [variable["name"] for variable in template["spec"]["containers"][0]["env"]]
        assert ("HF_TOKEN" in names) == (name != "cpu-demo") and {"HF_HOME", "RAPID_CACHE"} <= set(names)


def selects(selector: Json, labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(it["key"]) in it["values"] for it in selector.get("matchExpressions", ())
    )


@every
def test_only_who_uses_a_store_reaches_it_and_all_pods_refuse_the_rest(name: str) -> None:
    policies = {it["metadata"]["name"]: it["spec"] for it in of_kind(name, "NetworkPolicy")}
    labels = {component: template["metadata"]["labels"] for component, template in pod_templates(name).items()}
    deny = policies[f"rapid-{name}-default-deny"]
    assert not deny["ingress"] and not deny["egress"] and set(deny["policyTypes"]) == {"Ingress", "Egress"}
    assert all(selects(deny["podSelector"], own) for own in labels.values())
    [retriever] = [it for it in served(name)["applications"][0]["deployments"] if it["name"] == "Retriever"]
    retrieves = retriever["ray_actor_options"]["label_selector"][GROUP_LABEL]
    for store, port, allowed in (("qdrant", 6333, retrieves), ("redis", 6379, "head")):
        policy = policies[f"rapid-{name}-{store}"]
        [rule] = policy["ingress"]
        [peer] = rule["from"]
        assert selects(policy["podSelector"], labels[f"rapid-{name}-{store}"])
        assert {component for component, own in labels.items() if selects(peer["podSelector"], own)} == {allowed}
        assert rule["ports"] == [{"protocol": "TCP", "port": port}]
        sent = [rule for rule in policies[f"rapid-{name}-ray"]["egress"] if rule.get("ports") == [*rule_ports(port)]]
        assert any(selects(to["podSelector"], labels[f"rapid-{name}-{store}"]) for rule in sent for to in rule["to"])


def rule_ports(port: int) -> list[Json]:
    return [{"protocol": "TCP", "port": port}]


@every
def test_from_outside_only_the_serve_port_is_open_to_clients(name: str) -> None:
    [policy] = [it["spec"] for it in of_kind(name, "NetworkPolicy") if it["metadata"]["name"] == f"rapid-{name}-ray"]
    clients = [
        rule
        for rule in policy["ingress"]
        if {"matchLabels": {"rapid/clients": "true"}} in [peer.get("namespaceSelector") for peer in rule["from"]]
    ]
    assert [rule["ports"] for rule in clients] == [rule_ports(8000)]
    assert all("from" in rule for rule in policy["ingress"])


@every
def test_the_monitor_finds_the_ports_it_names(name: str) -> None:
    [monitor] = of_kind(name, "PodMonitor")
    named = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    ray = [it["spec"] for it in pod_templates(name).values() if "restartPolicy" in it["spec"]]
    head, *workers = [spec["containers"][0] for spec in ray]
    assert named <= {port["name"] for port in head["ports"]}
    assert all("metrics" in {port["name"] for port in worker["ports"]} for worker in workers)


@every
def test_kubernetes_api_is_reached_on_the_ports_that_it_has(name: str) -> None:
    """443 in front of it; behind that 6443, or minikube's 8443."""
    [policy] = [it["spec"] for it in of_kind(name, "NetworkPolicy") if it["metadata"]["name"] == f"rapid-{name}-ray"]
    [anywhere] = [rule for rule in policy["egress"] if "to" not in rule]
    assert [port["port"] for port in anywhere["ports"]] == [443, 6443, 8443]


def test_redis_is_ready_when_it_answers_and_not_when_it_complains(tmp_path: Path) -> None:
    """redis-cli exits 0 with both."""
    probe = pod_templates("cpu-demo")["rapid-cpu-demo-redis"]["spec"]["containers"][0]["readinessProbe"]["exec"]
    cli = tmp_path / "redis-cli"
    for answer, is_ready in (
        ("PONG", True),
        ("NOAUTH Authentication required.", False),
        ("LOADING Redis is loading the dataset in memory", False),
    ):
        cli.write_text(f"#!/bin/sh\necho '{answer}'\n")
        cli.chmod(0o755)
        asked = subprocess.run(probe["command"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=False, timeout=30)
        assert (asked.returncode == 0) == is_ready, answer


def test_the_password_of_redis_is_no_argument(tmp_path: Path) -> None:
    """Who may list processes would read it. Redis reads a configuration from standard input where "-" comes last."""
    container = pod_templates("cpu-demo")["rapid-cpu-demo-redis"]["spec"]["containers"][0]
    server = tmp_path / "redis-server"
    server.write_text('#!/bin/sh\necho "arguments: $@"\ncat\n')
    server.chmod(0o755)
    password = "0123456789abcdef"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "REDIS_PASSWORD": password}
    command = [*container["command"], *container["args"]]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=30).stdout
    arguments, *read = said.splitlines()
    assert arguments.endswith(" -") and password not in arguments and read == [f'requirepass "{password}"']


@every
def test_only_who_retrieves_has_the_key_that_qdrant_asks_for(name: str) -> None:
    templates = pod_templates(name)
    key = {"secretKeyRef": {"name": f"rapid-{name}-qdrant", "key": "key"}}
    has = {
        (pod, it["name"])
        for pod, template in templates.items()
        for container in template["spec"]["containers"]
        for it in container.get("env", ())
        if it.get("valueFrom") == key
    }
    assert len(has) == 2 and (f"rapid-{name}-qdrant", "QDRANT__SERVICE__API_KEY") in has
    assert {variable for _, variable in has} == {"QDRANT__SERVICE__API_KEY", "QDRANT_API_KEY"}


# The image


def test_the_image_pins_what_the_constraints_pin() -> None:
    dockerfile, pins = (ROOT / "Dockerfile").read_text(), (ROOT / "constraints.txt").read_text()
    [torch] = re.findall(r"^torch==(\S+)$", pins, re.MULTILINE)
    assert re.findall(r"torch==([\d.]+)(\+cpu)?", dockerfile) == [(torch, "+cpu"), (torch, "")]
    assert dockerfile.count("pip install") == dockerfile.count("-c constraints.txt") == 4
    installed = re.findall(r"pip install .* '?\.(?:\[([\w,-]+)\])?'?$", dockerfile, re.MULTILINE)
    assert installed == ["otel", "otel"]  # traces from both
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for requirement in extras["otel"]:
        assert f"\n{requirement.partition('>=')[0]}==" in pins
    [ray] = re.findall(r"^ray==(\S+)$", pins, re.MULTILINE)
    assert cluster("cpu-demo")["rayVersion"] == ray


def test_the_image_is_one_that_the_pods_can_run() -> None:
    """Its targets, its user, a pinned Python, and every package that the application is imported from."""
    dockerfile, ignored = (ROOT / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text().split()
    stages = re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.MULTILINE)
    assert stages[-2:] == ["cpu", "gpu"]
    assert all(
        re.fullmatch(r"python:3\.11\.\d+-slim-\w+", image) for image in re.findall(r"FROM (python\S+)", dockerfile)
    )
    assert "USER 1000:1000" in dockerfile
    copied = re.findall(r"^COPY (\w+) /\1$", dockerfile, re.MULTILINE)
    assert copied == ["rapid", "retrieval", "cluster", "deployments"]
    assert all(f"!{package}" in ignored for package in copied)


def test_the_service_of_a_config_is_named_after_it() -> None:
    service = read_service(ROOT / "configs" / "llama-8b.yaml", cpu_image="c", gpu_image="g")
    assert (service.name, service.image, service.needs_hub_token) == ("rapid-llama-8b", "g", True)
