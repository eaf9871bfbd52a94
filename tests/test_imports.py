"""Who may import whom: the core runs with torch, transformers and accelerate alone, and every library has one door.

The API is made and tested without Ray, and the process that listens loads no model's libraries.
"""

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
OPTIONAL = {"llvmlite", "llguidance", "triton"}  # where one is needed and not installed, an error says so
ON_RAY = ("deployments/serve/", "deployments/app.py", "deployments/cli/serve.py")
DOORS = {
    "qdrant_client": "retrieval/store.py",
    "FlagEmbedding": "retrieval/embedding.py",
    "llvmlite": "rapid/kernels/cpu/jit.py",
    "triton": "rapid/kernels/cuda/jit.py",
    "llguidance": "rapid/sampling/grammar",
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


def loaded_by(*modules: str) -> set[str]:
    """The top-level packages that a new process has loaded once it has imported ``modules``."""
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return {module.partition(".")[0] for module in result.stdout.split()}


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


@parametrize("deployments/")
def test_ray_is_imported_only_where_the_application_runs_on_it(name: str) -> None:
    assert name.startswith(ON_RAY) or "ray" not in imported(parsed(name))


@parametrize(*PACKAGES)
def test_a_library_is_imported_through_its_one_door(name: str) -> None:
    assert not imported(parsed(name)) & {library for library, door in DOORS.items() if not name.startswith(door)}


@parametrize(*PACKAGES)
def test_imports_are_absolute(name: str) -> None:
    assert "." not in imported(parsed(name))


def test_importing_all_of_the_core_loads_nothing_of_the_rest() -> None:
    names = [file.relative_to(ROOT).with_suffix("").as_posix() for file in (ROOT / "rapid").rglob("*.py")]
    loaded = loaded_by(*sorted(name.removesuffix("/__init__").replace("/", ".") for name in names))
    assert "rapid" in loaded
    assert not loaded & {"llguidance", "ray", "FlagEmbedding", "qdrant_client", "fastapi", *PACKAGES[1:]}


def test_the_api_and_all_behind_it_are_loaded_without_ray() -> None:
    loaded = loaded_by("deployments.http.api", "deployments.service", "deployments.builders", "deployments.config")
    assert "deployments" in loaded and "ray" not in loaded


def test_the_process_that_listens_loads_no_models_libraries() -> None:
    loaded = loaded_by("deployments.serve.ingress")
    assert "ray" in loaded and not loaded & CORE


def rooms() -> list[str]:
    """The folders and files of the core as `rapid`'s docstring orders them, the lowest first."""
    docstring = ast.get_docstring(parsed("rapid/__init__.py"))
    assert docstring is not None
    return docstring.partition("tests/test_imports.py`):")[2].split()


def modules_imported(tree: ast.AST) -> set[str]:
    """Full names, those for type checkers and those inside functions included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_room_of_the_core_has_its_place_in_the_order() -> None:
    there = {
        path.stem for path in (ROOT / "rapid").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert sorted(rooms()) == sorted(there - {"__init__"})


@parametrize("rapid/")
def test_no_import_runs_upward_between_the_rooms_of_the_core(name: str) -> None:
    order, room = rooms(), Path(name).parts[1].removesuffix(".py")
    if room == "__init__":
        return
    above = set(order[order.index(room) + 1 :])
    assert (
        not {module.split(".")[1] for module in modules_imported(parsed(name)) if module.startswith("rapid.")} & above
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_goes_round_in_a_circle(package: str) -> None:
    """At run time: what only type checkers see, or a function imports when it is called, closes no circle."""
    graph: dict[str, set[str]] = {}
    for file in (ROOT / package).rglob("*.py"):
        module = file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        tree = parsed(file.relative_to(ROOT).as_posix())
        graph[module] = modules_imported(
            ast.Module(
                [
                    n
                    for n in tree.body
                    if not isinstance(n, ast.If | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                ],
                [],
            )
        )
    graph = {module: (found & graph.keys()) - {module} for module, found in graph.items()}
    while leaves := [module for module, found in graph.items() if not found]:
        for leaf in leaves:
            del graph[leaf]
        graph = {module: found.difference(leaves) for module, found in graph.items()}
    assert not graph, f"these import each other: {sorted(graph)}"
