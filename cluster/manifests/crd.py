"""Offline validation of Kubernetes objects against KubeRay's CRDs, which also contain many other schemas.

A CRD's schema is JSON Schema with extensions of Kubernetes. This module first translates the extensions into JSON
Schema; then the jsonschema library checks. As on a server, defaults are filled in before, and an unknown field is an
error.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

# Parts of other kinds that a RayService also contains: the path in the object, and the path in the RayService's schema.
_HEAD_POD = ("spec", "rayClusterConfig", "headGroupSpec", "template")
_CLAIM = (*_HEAD_POD, "spec", "volumes", "*", "ephemeral", "volumeClaimTemplate", "spec")
_POLICY = ("spec", "rayClusterConfig", "networkPolicy", "head")
_BORROWED: dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    "StatefulSet": ((("spec", "template"), _HEAD_POD), (("spec", "volumeClaimTemplates", "*", "spec"), _CLAIM)),
    "Service": ((("spec",), ("spec", "serveService", "spec")),),
    "PersistentVolumeClaim": ((("spec",), _CLAIM),),
    "NetworkPolicy": (
        (("spec", "ingress"), (*_POLICY, "ingressRules")),
        (("spec", "egress"), (*_POLICY, "egressRules")),
    ),
}


class Crds:
    """The schemas of a folder's CRD files.

    Raises:
        FileNotFoundError: the folder has no RayService CRD.
    """

    def __init__(self, folder: Path) -> None:
        self._schemas: dict[tuple[str, str], dict[str, Any]] = {}
        for file in sorted(folder.glob("*.yaml")):
            crd = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)["spec"]
            for version in crd["versions"]:
                api_version = f"{crd['group']}/{version['name']}"
                self._schemas[api_version, crd["names"]["kind"]] = version["schema"]["openAPIV3Schema"]
        if ("ray.io/v1", "RayService") not in self._schemas:
            raise FileNotFoundError(f"{folder} holds no CRD of ray.io/v1 RayService")

    def validate(self, document: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The object with the defaults filled in, and its errors in order, as "where: what".

        For a kind without a CRD it checks the parts that a RayService also contains, such as a pod's template.
        """
        document = copy.deepcopy(document)
        schema = self._schemas.get((document["apiVersion"], document["kind"]))
        if schema is not None:
            return document, list(_errors(document, schema, ()))
        wrong: list[str] = []
        for path, schema_path in _BORROWED.get(document["kind"], ()):
            part_schema = _at(self._schemas["ray.io/v1", "RayService"], schema_path)
            for where, part in _parts(document, path):
                wrong += _errors(part, part_schema, where)
        return document, wrong

    def covers(self, document: dict[str, Any]) -> bool:
        """Whether there is a schema of the object, or of a part of it."""
        return (document["apiVersion"], document["kind"]) in self._schemas or document["kind"] in _BORROWED


def _errors(value: Any, schema: dict[str, Any], where: tuple[str | int, ...]) -> Iterator[str]:
    _fill_in(value, schema)
    for error in Draft202012Validator(_in_json_schema(schema, is_root=not where)).iter_errors(value):
        path = ".".join(str(step) for step in (*where, *error.absolute_path))
        yield f"{path or 'object'}: {error.message}"


def _fill_in(value: Any, schema: dict[str, Any]) -> None:
    """Sets the schema's defaults for fields that ``value`` lacks."""
    if isinstance(value, dict):
        for name, inner in schema.get("properties", {}).items():
            if name not in value and "default" in inner:
                value[name] = copy.deepcopy(inner["default"])
        for name, child in value.items():
            inner = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            if isinstance(inner, dict):
                _fill_in(child, inner)
    elif isinstance(value, list):
        for child in value:
            _fill_in(child, schema.get("items", {}))


def _in_json_schema(schema: dict[str, Any], *, is_root: bool = False) -> dict[str, Any]:
    """``schema`` in plain JSON Schema: no unknown fields, integers or strings where both are allowed, nulls."""
    if schema.get("x-kubernetes-int-or-string"):
        # A pattern restricts only strings, in JSON Schema and in Kubernetes.
        return {"type": ["integer", "string"]} | {key: schema[key] for key in ("pattern",) if key in schema}
    said = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-") and key != "nullable"}
    if schema.get("nullable"):
        said["type"] = [schema["type"], "null"]
    if "items" in schema:
        said["items"] = _in_json_schema(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        said["additionalProperties"] = _in_json_schema(schema["additionalProperties"])
    if "properties" in schema:
        inner = {name: _in_json_schema(value) for name, value in schema["properties"].items()}
        if is_root and "metadata" in inner:
            # Kubernetes checks these three fields itself, and ignores the CRD's schema of them.
            inner |= {"metadata": {"type": "object"}, "apiVersion": {"type": "string"}, "kind": {"type": "string"}}
        said["properties"] = inner
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            said.setdefault("additionalProperties", False)
    return said


def _at(schema: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    for step in path:
        schema = schema["items"] if step == "*" else schema["properties"][step]
    return schema


def _parts(
    value: Any, path: Sequence[str], where: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every part of ``value`` at ``path``, with the steps to it; "*" in the path means each item of a list."""
    if not path:
        yield where, value
    elif path[0] == "*":
        for i, item in enumerate(value):
            yield from _parts(item, path[1:], (*where, i))
    elif path[0] in value:
        yield from _parts(value[path[0]], path[1:], (*where, path[0]))
