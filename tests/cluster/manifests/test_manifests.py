"""The manifests on disk: made from the configs, of the size that the placement needs, with time to end."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kube import NAMES, ROOT, Json, amounts, cluster, every, of_kind, pod_templates, ray_service, served
from ray.serve import Application

from cluster.manifests.objects import manifests
from cluster.manifests.topology import GROUP_LABEL, Group, Replica
from cluster.placement import engine_bundles
from deployments.app import build
from deployments.cli.main import main
from deployments.cli.manifests import read_service
from deployments.cli.serve import read_endpoint
from deployments.config import ConfigError, read_config

# Made from the configs


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs `rapid manifests` in a folder: its exit code, and what it says."""

    def in_folder(folder: Path, *arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        with pytest.raises(SystemExit) as done:
            main(["manifests", *arguments])
        said = capsys.readouterr()
        return int(done.value.code or 0), said.out + said.err

    return in_folder


def test_the_manifests_are_what_the_configs_make(run: Callable[..., tuple[int, str]]) -> None:
    """A config that is changed without `rapid manifests`, or a manifest that is edited by hand, fails here."""
    code, said = run(ROOT, "--check")
    assert code == 0, said
    assert said.splitlines() == sorted(f"cluster/kuberay/{name}.yaml is up to date" for name in NAMES)


def test_drift_is_named(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    config = tmp_path / "configs" / "cpu-demo.yaml"
    config.parent.mkdir()
    config.write_text((ROOT / "configs" / "cpu-demo.yaml").read_text())
    drifted = "rapid: error: not what the configs make: cluster/kuberay/{}.yaml. Run `rapid manifests`.\n"
    assert run(tmp_path, "--check") == (1, drifted.format("cpu-demo"))
    assert run(tmp_path) == (0, "cluster/kuberay/cpu-demo.yaml written\n")
    assert run(tmp_path, "--check")[0] == 0
    config.write_text(config.read_text().replace("kv_memory_gib: 2", "kv_memory_gib: 3"))
    assert run(tmp_path, "--check") == (1, drifted.format("cpu-demo"))
    assert run(tmp_path)[0] == 0
    (tmp_path / "cluster" / "kuberay" / "gone.yaml").write_text("")
    assert run(tmp_path, "--check") == (1, drifted.format("gone"))


@every
def test_serve_reads_what_the_manifest_holds(name: str, tmp_path: Path) -> None:
    """Ray Serve's schema and ours take it, and it serves what the file serves but for where the vectors are."""
    rendered = tmp_path / "serve.yaml"
    rendered.write_text(ray_service(name)["spec"]["serveConfigV2"])
    assert read_endpoint(rendered).host == "0.0.0.0"
    mine, its = read_config(ROOT / "configs" / f"{name}.yaml"), read_config(rendered)
    assert its.retriever.qdrant_url == f"http://rapid-{name}-qdrant:6333"
    without = {"retriever": mine.retriever}
    assert its.model_copy(update=without).model_dump() == mine.model_dump()
    read_endpoint(ROOT / "configs" / f"{name}.yaml")


@every
@pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")
def test_every_deployment_of_the_application_has_its_place(name: str) -> None:
    """Serve refuses a config that names one which is not there, and puts one that it does not name anywhere.

    The bundles in the manifest are those of the application itself.
    """

    def deployments(application: Any) -> dict[str, Any]:
        own = application._bound_deployment
        inner = (deployments(it) for it in own.init_args if isinstance(it, Application))
        bundles = {own.name: own._replica_config.placement_group_bundles}
        return bundles | {key: value for found in inner for key, value in found.items()}

    placed = served(name)["applications"][0]["deployments"]
    bundles = {deployment["name"]: deployment.get("placement_group_bundles") for deployment in placed}
    assert bundles == deployments(build(read_config(ROOT / "configs" / f"{name}.yaml")))


# Of the right size


@every
def test_a_pod_holds_exactly_one_placement_group(name: str) -> None:
    """CPUs and GPUs of a group's pod are those of one replica's bundles, which its deployment is bound to by label."""
    config = read_config(ROOT / "configs" / f"{name}.yaml")
    engines = {"Target": config.target} | ({} if config.colocated else {"Drafter": config.drafter})
    groups = {group["groupName"]: group for group in cluster(name)["workerGroupSpecs"]}
    deployments = {it["name"]: it for it in served(name)["applications"][0]["deployments"]}
    for deployment, engine in engines.items():
        bundles = engine_bundles(num_cpus=engine.num_cpus, num_gpus=engine.num_gpus, num_ranks=engine.tensor_parallel)
        assert deployments[deployment]["placement_group_bundles"] == bundles
        group = groups[deployment.lower()]
        cpus, gpus = amounts(group)
        assert gpus == engine.tensor_parallel * engine.num_gpus
        assert 0 <= cpus - sum(bundle["CPU"] for bundle in bundles) < 1
        assert deployments[deployment]["placement_group_bundle_label_selector"] == [group["labels"]]
        assert (group["minReplicas"], group["maxReplicas"]) == (engine.replicas.min, engine.replicas.max)
    assert set(groups) - {name.lower() for name in engines} <= {"front", "retriever"}
    assert ("drafter" in groups) != config.colocated


@every
def test_everything_else_fits_where_it_is_sent(name: str) -> None:
    """Ingress, Coordinator and Retriever: one of each that a pod is for fits it, and nothing can land on the head."""
    groups = {group["labels"][GROUP_LABEL]: group for group in cluster(name)["workerGroupSpecs"]}
    demands: dict[str, list[tuple[float, float]]] = {}
    for deployment in served(name)["applications"][0]["deployments"]:
        if "ray_actor_options" in deployment:
            options = deployment["ray_actor_options"]
            group = groups[options["label_selector"][GROUP_LABEL]]
            assert deployment["num_replicas"] == group["minReplicas"] == group["maxReplicas"]
            assert options["num_cpus"] > 0
            demands.setdefault(group["groupName"], []).append((options["num_cpus"], options["num_gpus"]))
    assert sum(len(held) for held in demands.values()) == 3
    for group_name, held in demands.items():
        cpus, gpus = amounts(groups[group_name])
        assert 0 <= cpus - sum(demand[0] for demand in held) < 1 and gpus == sum(demand[1] for demand in held)
    assert cluster(name)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize(
    ("name", "fewest", "most"),
    [("cpu-demo", 0, 0), ("llama-8b", 1, 1), ("llama-8b-70b", 6, 25), ("qwen-7b-72b", 6, 25)],
)
def test_gpus_of_a_service(name: str, fewest: int, most: int) -> None:
    """Of the large ones: 1 + 4 and the embedder's 1, up to 8 × 1 + 4 × 4 and its 1."""
    groups = cluster(name)["workerGroupSpecs"]
    assert sum(group["minReplicas"] * amounts(group)[1] for group in groups) == fewest
    assert sum(group["maxReplicas"] * amounts(group)[1] for group in groups) == most


def test_a_sum_that_is_whole_but_for_its_binary_digits_takes_no_more() -> None:
    replica = Replica("Drafter", tuple(engine_bundles(num_cpus=0.7, num_gpus=1, num_ranks=7)), has_placement_group=True)
    assert sum(bundle["CPU"] for bundle in replica.bundles) > 5
    assert (Group("drafter", (replica,)).cpus, Group("drafter", (replica,)).gpus) == (5, 7)


# Ending and staying up


@every
def test_a_pod_is_given_longer_to_end_than_a_stream_may_take(name: str) -> None:
    config = read_config(ROOT / "configs" / f"{name}.yaml")
    longest = max(config.target.drain_timeout_s, config.drafting_engine.drain_timeout_s)
    assert config.access.request_timeout_s is not None and config.access.request_timeout_s <= longest
    assert served(name)["applications"][0]["args"]["access"]["request_timeout_s"] == config.access.request_timeout_s
    for group in cluster(name)["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        assert spec["terminationGracePeriodSeconds"] > longest
        hook = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        deadline = int(re.findall(r"--deadline-remaining-seconds (\d+)", hook)[0])
        assert longest < deadline < spec["terminationGracePeriodSeconds"]
    assert ray_service(name)["spec"]["rayClusterDeletionDelaySeconds"] > longest
    for deployment in served(name)["applications"][0]["deployments"]:
        if deployment["name"] in ("Ingress", "Coordinator"):
            assert deployment["graceful_shutdown_timeout_s"] >= longest


@pytest.mark.parametrize("timeout", ["", "request_timeout_s: 301"])
def test_an_answer_that_may_outlive_its_pod_makes_no_manifest(timeout: str, tmp_path: Path) -> None:
    config = (ROOT / "configs" / "cpu-demo.yaml").read_text()
    path = tmp_path / "cpu-demo.yaml"
    path.write_text(re.sub(r"request_timeout_s: \d+", timeout or "max_body_mb: 1", config))
    with pytest.raises(ConfigError, match=r"request_timeout_s must be at most target\.drain_timeout_s, 300, got"):
        read_service(path, cpu_image="c", gpu_image="g")


def test_the_installed_ray_has_the_command_that_drains() -> None:
    """It is a hidden one, and may go or change."""
    from ray.scripts.scripts import drain_node

    worker = pod_templates("cpu-demo")["target"]["spec"]["containers"][0]
    hook = worker["lifecycle"]["preStop"]["exec"]["command"][-1]
    command = hook.partition("ray drain-node")[2].partition("||")[0]
    options = {name: option for option in drain_node.params for name in option.opts}
    assert set(re.findall(r"--[a-z-]+", command)) <= set(options)
    assert "DRAIN_NODE_REASON_PREEMPTION" in options["--reason"].type.choices


def test_a_pod_whose_head_is_gone_ends_at_once(tmp_path: Path) -> None:
    """There is nobody to drain for; nothing may hold the pod for its whole grace period."""
    ray = tmp_path / "ray"
    ray.write_text("#!/bin/sh\necho $* >&2\nexit 1\n")
    ray.chmod(0o755)
    command = pod_templates("cpu-demo")["target"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr.startswith("drain-node --reason DRAIN_NODE_REASON_PREEMPTION ")


@every
def test_upgrades_go_in_steps_where_there_are_steps(name: str) -> None:
    strategy = ray_service(name)["spec"]["upgradeStrategy"]
    has_steps = any(group["maxReplicas"] > group["minReplicas"] for group in cluster(name)["workerGroupSpecs"])
    assert (strategy["type"] == "NewClusterWithIncrementalUpgrade") == has_steps == name.endswith(("70b", "72b"))


@every
def test_every_kind_of_pod_has_a_budget_that_its_pods_can_meet(name: str) -> None:
    budgets = {
        tuple(it["spec"]["selector"]["matchLabels"].items()): it["spec"]["minAvailable"]
        for it in of_kind(name, "PodDisruptionBudget")
    }
    pods = {tuple(it["metadata"]["labels"].items()): component for component, it in pod_templates(name).items()}
    assert set(budgets) == set(pods)
    least = {group["groupName"]: group["minReplicas"] for group in cluster(name)["workerGroupSpecs"]}
    for labels, component in pods.items():
        assert budgets[labels] == max(1, least.get(component, 1) - 1)


@every
def test_every_container_is_probed(name: str) -> None:
    for template in pod_templates(name).values():
        for container in template["spec"]["containers"]:
            assert container["livenessProbe"] and container["readinessProbe"]


@every
def test_the_state_outlives_its_pods(name: str) -> None:
    stores = {it["metadata"]["name"]: it["spec"] for it in of_kind(name, "StatefulSet")}
    assert set(stores) == {f"rapid-{name}-qdrant", f"rapid-{name}-redis"}
    assert all(spec["volumeClaimTemplates"][0]["metadata"]["name"] == "data" for spec in stores.values())
    redis = cluster(name)["gcsFaultToleranceOptions"]
    assert redis["redisAddress"] == f"rapid-{name}-redis:6379"
    assert redis["redisPassword"] == {"valueFrom": {"secretKeyRef": {"name": f"rapid-{name}-redis", "key": "password"}}}
    assert of_kind(name, "PersistentVolumeClaim")[0]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert cluster(name)["autoscalerOptions"]["version"] == "v2" and cluster(name)["enableInTreeAutoscaling"]


def test_another_serve_config_is_an_upgrade_and_no_restart_in_place(tmp_path: Path) -> None:
    """KubeRay makes a new cluster when anything but numbers of replicas differs in the cluster's spec."""

    def spec(config: str) -> Json:
        path = tmp_path / "cpu-demo.yaml"
        path.write_text(config)
        return manifests(read_service(path, cpu_image="c", gpu_image="g"))[-1]["spec"]["rayClusterConfig"]

    config = (ROOT / "configs" / "cpu-demo.yaml").read_text()
    assert spec(config) == spec(config + "# a remark\n")
    before, after = spec(config), spec(config.replace("chunk_tokens: 256", "chunk_tokens: 128"))
    assert before["headGroupSpec"]["template"]["metadata"] != after["headGroupSpec"]["template"]["metadata"]


@every
def test_the_guide_makes_every_secret_that_a_pod_reads(name: str) -> None:
    """KubeRay makes one itself, which no template names."""
    secrets = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8").partition("## 3.")[2].partition("## 4.")[0]
    made = dict(re.findall(r"create secret generic (\S+) --from-literal=(\w+)=", secrets.replace("NAME", name)))
    read = {}
    for template in pod_templates(name).values():
        for container in template["spec"]["containers"]:
            found = [it["valueFrom"]["secretKeyRef"] for it in container.get("env", ()) if "valueFrom" in it]
            read |= {it["name"]: it["key"] for it in found}
        for secret in template["spec"].get("imagePullSecrets", ()):
            assert f"create secret docker-registry {secret['name']} " in secrets
    assert {f"rapid-{name}-redis", f"rapid-{name}-api-keys"} <= set(read) and read.items() <= made.items()


def test_the_guide_names_what_there_is() -> None:
    """Its table of sizes, and the objects in its commands."""
    guide = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    for name in NAMES:
        groups = cluster(name)["workerGroupSpecs"]
        bounds = [sum(group[key] * amounts(group)[1] for group in groups) for key in ("minReplicas", "maxReplicas")]
        cpus = [sum(group[key] * amounts(group)[0] for group in groups) for key in ("minReplicas", "maxReplicas")]
        gpus, cores = ("–".join(str(end) for end in sorted(set(ends))) for ends in (bounds, cpus))
        cache = of_kind(name, "PersistentVolumeClaim")[0]["spec"]["resources"]["requests"]["storage"]
        assert re.search(rf"^\| `{name}` \| .* \| {gpus} \| {cores} \| {cache} \|$", guide, re.MULTILINE), name
    for path in set(re.findall(r"(?:cluster|configs)/[\w/.-]+\.(?:yaml|py)", guide)):
        assert all((ROOT / path.replace("NAME", name)).is_file() for name in NAMES), path
