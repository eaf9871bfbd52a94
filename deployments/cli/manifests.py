"""`rapid manifests`: from the Serve config files to the Kubernetes objects that serve them."""

from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from cluster.manifests.crd import Crds
from cluster.manifests.objects import manifests, to_yaml
from cluster.manifests.rules import violations
from cluster.manifests.topology import LIGHT_CPUS, Group, Replica, Service
from cluster.placement import engine_bundles
from deployments.config import AppConfig, ConfigError, read_config
from deployments.engine_config import EngineConfig
from rapid.errors import RapidError
from rapid.weights import embedded_models

CONFIGS, MANIFESTS = Path("configs"), Path("cluster/kuberay")


class ManifestError(RapidError):
    """The manifests on disk are not what the configs make, or not what Kubernetes takes; the message says which."""

    _code = "manifest_error"


def read_service(path: Path, *, cpu_image: str, gpu_image: str) -> Service:
    """The service that a Serve config file describes, named after the file.

    Raises:
        ConfigError: the file cannot be read or is wrong, or lets an answer take longer than its pod is given to end.
    """
    config = read_config(path)
    longest, drain_s = config.access.request_timeout_s, config.target.drain_timeout_s
    if longest is None or longest > drain_s:
        raise ConfigError(
            f"{path}: access.request_timeout_s must be at most target.drain_timeout_s, {drain_s:g}, got {longest}: "
            "an answer that takes longer would be cut off when its pod ends"
        )
    document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    groups = _groups(config, document["applications"][0].get("deployments", []))
    models = (config.target.model, config.drafting_engine.model, config.retriever.embedder)
    return Service(
        name=f"rapid-{path.stem}",
        image=gpu_image if any(group.gpus for group in groups) else cpu_image,
        ray_version=metadata.version("ray"),
        serve_config=document,
        groups=groups,
        drain_timeout_s=_longest_stream(config),
        needs_hub_token=not all(embedded_models.is_embedded(model) for model in models),
    )


def render(service: Service) -> str:
    """The service's manifest file."""
    note = (
        f"# Made by `rapid manifests` from configs/{service.name.removeprefix('rapid-')}.yaml: change that instead.\n"
    )
    return f"{note}---\n{to_yaml(manifests(service))}"


def write(root: Path, *, cpu_image: str, gpu_image: str) -> None:
    """Writes the manifests of all configs under ``root``."""
    for path, text in _rendered(root, cpu_image, gpu_image).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def check(root: Path, *, cpu_image: str, gpu_image: str, crds: Path | None = None) -> list[Path]:
    """Compares the manifests on disk with the configs, KubeRay's rules, and ``crds``, a folder of KubeRay's, if any.

    Raises:
        ManifestError: one is missing, differs, has no config any more, or is invalid; the message names the files.
    """
    rendered = _rendered(root, cpu_image, gpu_image)
    drifted = [path for path, text in rendered.items() if not path.is_file() or path.read_text("utf-8") != text]
    drifted += sorted(set((root / MANIFESTS).glob("*.yaml")) - set(rendered))
    if drifted:
        files = ", ".join(path.relative_to(root).as_posix() for path in drifted)
        raise ManifestError(f"not what the configs make: {files}. Run `rapid manifests`.")
    schemas = Crds(crds) if crds else None
    wrong = [f"{path.name}: {problem}" for path in rendered for problem in problems(path.read_text("utf-8"), schemas)]
    if wrong:
        raise ManifestError("; ".join(wrong))
    return list(rendered)


def problems(text: str, schemas: Crds | None) -> list[str]:
    """What KubeRay's rules, and the schemas where given, have against a manifest file."""
    found = []
    for document in yaml.safe_load_all(text):
        where = f"{document['kind']} {document['metadata']['name']}"
        if schemas:
            document, wrong = schemas.validate(document)
            found += [f"{where}: {message}" for message in wrong]
        if document["kind"] == "RayService":
            found += [f"{where}: {message}" for message in violations(document)]
    return found


def _rendered(root: Path, cpu_image: str, gpu_image: str) -> dict[Path, str]:
    configs = sorted((root / CONFIGS).glob("*.yaml"))
    if not configs:
        raise ManifestError(f"there is no config in {root / CONFIGS}")
    services = (read_service(path, cpu_image=cpu_image, gpu_image=gpu_image) for path in configs)
    return {root / MANIFESTS / path.name: render(service) for path, service in zip(configs, services, strict=True)}


def _groups(config: AppConfig, deployments: list[dict[str, Any]]) -> tuple[Group, ...]:
    """A group for each kind of engine, and one for what passes requests on. A retriever on a GPU has its own."""
    asked = {deployment["name"]: deployment for deployment in deployments}

    def light(name: str, reserved: dict[str, float], drain_timeout_s: float | None = None) -> Replica:
        num_replicas = asked.get(name, {}).get("num_replicas", 1)
        return Replica(name, (reserved,), num_replicas=num_replicas, drain_timeout_s=drain_timeout_s)

    def reserved(name: str) -> dict[str, float]:
        return {"CPU": asked.get(name, {}).get("ray_actor_options", {}).get("num_cpus", LIGHT_CPUS)}

    front = [light(name, reserved(name), _longest_stream(config)) for name in ("Ingress", "Coordinator")]
    embedder = light("Retriever", {"CPU": config.retriever.num_cpus, "GPU": config.retriever.num_gpus})
    groups = [_engine_group("target", config.target)]
    if not config.colocated:
        groups.append(_engine_group("drafter", config.drafter))
    if config.retriever.num_gpus:
        return (*groups, _light_group("front", front), _light_group("retriever", [embedder]))
    return (*groups, _light_group("front", [*front, embedder]))


def _engine_group(name: str, config: EngineConfig) -> Group:
    bundles = engine_bundles(num_cpus=config.num_cpus, num_gpus=config.num_gpus, num_ranks=config.tensor_parallel)
    replica = Replica(name.capitalize(), tuple(bundles), has_placement_group=True)
    return Group(name, (replica,), min_pods=config.replicas.min, max_pods=config.replicas.max)


def _light_group(name: str, replicas: list[Replica]) -> Group:
    pods = max(replica.num_replicas for replica in replicas)
    return Group(name, tuple(replicas), min_pods=pods, max_pods=pods)


def _longest_stream(config: AppConfig) -> float:
    return max(config.target.drain_timeout_s, config.drafting_engine.drain_timeout_s)
