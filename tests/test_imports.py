"""Who may import whom: the core runs with torch, transformers and accelerate alone, and every library has one door."""

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = ("rapid", "retrieval", "cluster", "deployments")
FILES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]

CORE = {"torch", "transformers", "accelerate"}
BROUGHT_BY_CORE = {"huggingface_hub", "jinja2", "numpy", "tokenizers", "tqdm"}
OPTIONAL = {"torchao", "llvmlite", "llguidance"}  # where one is needed and not installed, an error says so
DOORS = {
    "qdrant_client": "retrieval/store.py",
    "FlagEmbedding": "retrieval/embedding.py",
    "torchao": "rapid/kernels/linear.py",
    "llvmlite": "rapid/kernels/cpu/jit.py",
    "llguidance": "rapid/sampling/grammar.py",
}


def imported(tree: ast.AST) -> set[str]:
    """The top-level packages that the code imports anywhere, in functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0] if node.module and not node.level else ".")
    return names


def parametrize(*packages: str) -> pytest.MarkDecorator:
    names = [file.relative_to(ROOT).as_posix() for file in FILES]
    return pytest.mark.parametrize("name", [name for name in names if name.startswith(packages)])


def parsed(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text())


@parametrize("rapid/")
def test_the_core_imports_only_its_three_libraries(name: str) -> None:
    assert imported(parsed(name)) <= sys.stdlib_module_names | CORE | BROUGHT_BY_CORE | OPTIONAL | {"rapid"}


def test_the_three_libraries_bring_what_the_core_takes_for_granted() -> None:
    requirements = [Requirement(text) for library in CORE for text in metadata.requires(library) or ()]
    required = {need.name for need in requirements if not need.marker or need.marker.evaluate({"extra": ""})}
    assert required >= BROUGHT_BY_CORE


@parametrize("rapid/", "retrieval/", "cluster/")
def test_packages_know_neither_each_other_nor_ray(name: str) -> None:
    others = {*PACKAGES, "ray", "fastapi"} - {name.partition("/")[0]}
    assert not imported(parsed(name)) & others


@parametrize(*PACKAGES)
def test_a_library_is_imported_through_its_one_door(name: str) -> None:
    assert not imported(parsed(name)) & {library for library, door in DOORS.items() if door != name}


@parametrize(*PACKAGES)
def test_imports_are_absolute(name: str) -> None:
    assert "." not in imported(parsed(name))


def test_importing_all_of_the_core_loads_nothing_of_the_rest() -> None:
    modules = [
        file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for file in (ROOT / "rapid").rglob("*.py")
    ]
    code = f"import sys, {', '.join(sorted(modules))}; print(*sys.modules)".replace(".__init__", "")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {module.partition(".")[0] for module in result.stdout.split()}
    assert "rapid" in loaded
    assert not loaded & {"torchao", "llguidance", "ray", "FlagEmbedding", "qdrant_client", "fastapi", *PACKAGES[1:]}
