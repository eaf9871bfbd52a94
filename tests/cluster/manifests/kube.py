"""What the tests of the manifests read: the files on disk, and parts of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
NAMES = ("cpu-demo", "llama-8b", "llama-8b-70b", "qwen-7b-72b")

Json = dict[str, Any]

every = pytest.mark.parametrize("name", NAMES)


def documents(name: str) -> list[Json]:
    return list(yaml.load_all((ROOT / "cluster" / "kuberay" / f"{name}.yaml").read_text(), Loader=yaml.CSafeLoader))


def of_kind(name: str, kind: str) -> list[Json]:
    return [document for document in documents(name) if document["kind"] == kind]


def ray_service(name: str) -> Json:
    return of_kind(name, "RayService")[0]


def cluster(name: str) -> Json:
    return ray_service(name)["spec"]["rayClusterConfig"]


def pod_templates(name: str) -> dict[str, Json]:
    """Every kind of pod: Ray's head, its workers, and the stores."""
    workers = {group["groupName"]: group["template"] for group in cluster(name)["workerGroupSpecs"]}
    stores = {found["metadata"]["name"]: found["spec"]["template"] for found in of_kind(name, "StatefulSet")}
    return {"head": cluster(name)["headGroupSpec"]["template"], **workers, **stores}


def served(name: str) -> Json:
    config: Json = yaml.safe_load(ray_service(name)["spec"]["serveConfigV2"])
    return config


def amounts(group: Json) -> tuple[int, int]:
    """Whole CPUs and GPUs of a pod, requested and not exceeded."""
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
    return int(resources["limits"]["cpu"]), int(resources["limits"].get("nvidia.com/gpu", "0"))
