"""`rapid doctor`: what of a configuration would not run on this machine, and why. No weights are loaded."""

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.placement import engine_bundles
from deployments.cli.plan import served
from deployments.cli.serve import read_endpoint
from deployments.config import AppConfig, ConfigError, RetrieverConfig, read_config
from deployments.datastores import Datastores
from deployments.engine_config import EngineConfig
from rapid.datastore.folder import DatastoreFolder
from rapid.errors import RapidError
from rapid.kernels.cpu import jit
from rapid.kv_cache.memory import free_memory
from rapid.models.loader import default_device, default_dtype
from rapid.text.tokenizer import check_same_tokenizer, load_tokenizer
from rapid.weights import embedded_models
from retrieval import RetrievalError
from retrieval.sparse import weighs_words
from retrieval.store import ChunkStore

PACKAGES = ("torch", "transformers", "ray", "qdrant-client", "llvmlite")
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")
WINDOW_FIELDS = ("max_position_embeddings", "n_positions")
LOW_DISK_GB = 2.0
COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


class Finding(NamedTuple):
    """What was looked at, how it is, and what to do where that is not well."""

    check: str
    status: Literal["ok", "warning", "problem"]
    message: str
    advice: str = ""


def examine(path: Path) -> list[Finding]:
    """Everything about this machine, and about the configuration in ``path`` on it."""
    findings = [_software(), *_processor(), *_gpus(), _memory(), _cache()]
    try:
        config = read_config(path)
        endpoint = read_endpoint(path)
    except ConfigError as error:
        remedy = "Correct the file; docs/configuration.md lists the fields."
        return [*findings, Finding("config", "problem", error.message, remedy)]
    findings.append(Finding("config", "ok", f"{path}: serves {config.model_name} at {endpoint.url}"))
    engines = {"target": config.target} | ({} if config.colocated else {"drafter": config.drafter})
    for name in dict.fromkeys([*(engine.model for engine in engines.values()), config.retriever.embedder]):
        findings.append(_model(name))
    if len(engines) == 2:
        findings.append(_tokenizers(config))
    findings += [*_datastore(config), *_fit(engines), *_reservation(config, engines)]
    try:
        endpoint.check_free()
        findings.append(Finding("port", "ok", f"{endpoint.port} of {endpoint.host} is free"))
    except RapidError as error:
        what, _, advice = error.message.partition(". ")
        findings.append(Finding("port", "problem", what, advice))
    return [*findings, _ray(), _qdrant(config.retriever)]


def _software() -> Finding:
    found, missing = [f"Python {platform.python_version()}"], []
    for package in ("rapid-serve", *PACKAGES):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        advice = f"make install, or pip install {' '.join(missing)}"
        return Finding("software", "warning", f"{', '.join(found)}; missing: {', '.join(missing)}", advice)
    return Finding("software", "ok", ", ".join(found))


def _processor() -> Iterator[Finding]:
    cores, kind = len(os.sched_getaffinity(0)), str(default_dtype("cpu")).removeprefix("torch.")
    level = torch.backends.cpu.get_cpu_capability()
    status: Literal["ok", "warning"] = "ok" if kind == "bfloat16" else "warning"
    advice = "" if status == "ok" else "Without AVX512-BF16, float32 takes twice the memory and time of bfloat16."
    yield Finding("processor", status, f"{cores} cores, {level}; dtype auto is {kind} on it", advice)
    if jit.available():
        yield Finding("kernels", "ok", "compiled for this processor by LLVM")
    else:
        advice = "PyTorch's operators do the work, more slowly. On Linux with PyTorch's own build: pip install llvmlite"
        yield Finding("kernels", "warning", "cannot be compiled here", advice)


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("GPUs", "ok", "none that PyTorch can use")
    for index in range(torch.cuda.device_count()):
        properties, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
        capability = f"capability {properties.major}.{properties.minor}"
        name = f"cuda:{index} {properties.name}, {capability}"
        yield Finding("GPUs", "ok", f"{name}: {_gb(free)} of {_gb(total)} free")


def _memory() -> Finding:
    return Finding("memory", "ok", f"{_gb(free_memory(torch.device('cpu')))} free for this process")


def _cache() -> Finding:
    folder = embedded_models.cache_dir()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return Finding("disk", "problem", f"{there} cannot be written", "Set RAPID_CACHE to a folder of your own.")
    advice = "" if free > LOW_DISK_GB * 1e9 else "Models need room: free some, or set RAPID_CACHE to another disk."
    return Finding("disk", "warning" if advice else "ok", f"{_gb(free)} free in {folder}", advice)


def _folder(name: str) -> Path | None:
    """Where a model's files are; None for a hub id."""
    if embedded_models.is_embedded(name):
        return embedded_models.cache_dir() / name
    path = Path(name).expanduser()
    return path if path.is_dir() or name.startswith(("/", ".", "~")) else None


def _model(name: str) -> Finding:
    folder = _folder(name)
    if folder is None:
        return _hub_model(name)
    if embedded_models.is_embedded(name):
        try:
            embedded_models.verify(name, hashes=False)
        except RapidError as error:
            if folder.exists():
                return Finding("model", "problem", error.message)
            return Finding(
                "model", "warning", f"{name} is not here yet", f"rapid models pull {name}; serve does it too."
            )
    elif not folder.is_dir():
        return Finding("model", "problem", f"there is no folder {folder}", "Correct the path in the config.")
    weights = [file for pattern in WEIGHT_FILES for file in folder.glob(pattern)]
    if not weights or not (folder / "config.json").exists():
        lacking = "config.json" if weights else "weights"
        return Finding("model", "problem", f"{folder} has no {lacking}", "A model folder is what transformers saves.")
    return Finding("model", "ok", f"{name}: {_gb(sum(file.stat().st_size for file in weights))} of weights in {folder}")


def _hub_model(name: str) -> Finding:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        known = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return Finding("model", "problem", f"{name} is no embedded model, folder or hub id", "See rapid models list.")
    if isinstance(known, str):
        return Finding("model", "ok", f"{name}: in the hub's cache, {Path(known).parent}")
    return Finding("model", "warning", f"{name} is not here yet", "It is fetched from the Hugging Face hub on start.")


def _tokenizers(config: AppConfig) -> Finding:
    names = config.target.model, config.drafter.model
    if names[0] == names[1]:
        return Finding("tokenizers", "ok", "target and drafter are the same model")
    if any(_model(name).status != "ok" for name in names):
        return Finding("tokenizers", "warning", "could not be compared", "Get both models first.")
    try:
        check_same_tokenizer(*(load_tokenizer(name) for name in names))
    except RapidError as error:
        return Finding("tokenizers", "problem", error.message)
    return Finding("tokenizers", "ok", f"{names[0]} and {names[1]} mean the same by every token")


def _datastore(config: AppConfig) -> Iterator[Finding]:
    """The datastore of all keys, if one is configured and the target's tokenizer is there."""
    path = config.datastore.path
    if path is None or _model(config.target.model).status != "ok":
        return
    try:
        Datastores(config, load_tokenizer(config.target.model))
    except RapidError as error:
        what, _, advice = error.message.rpartition(": ")
        yield Finding("datastore", "problem", what, advice.capitalize() + ".")
    else:
        yield Finding("datastore", "ok", f"{path} holds {DatastoreFolder(Path(path)).info().num_tokens:,} tokens")


def _fit(engines: dict[str, EngineConfig]) -> Iterator[Finding]:
    """Each engine's weights, and keys and values, beside what is free when those before it are loaded."""
    left: dict[str, float] = {}
    for role, engine in engines.items():
        device = default_device() if engine.device == "auto" else engine.device
        if device.startswith("cuda") and not torch.cuda.is_available():
            yield Finding(role, "problem", f"device {device}: there is none", "Set device to auto or cpu.")
            continue
        try:
            model = served(engine.model_copy(update={"dtype": _dtype(engine, device), "device": device}))
        except RapidError as error:
            yield Finding(role, "warning", f"what it needs cannot be told: {error.message}")
            continue
        # On a CPU all ranks and replicas share its memory; on GPUs each has its own, or what others leave of one.
        copies = engine.tensor_parallel * engine.replicas.min if device == "cpu" else 1
        where = role if engine.num_gpus >= 1 else device
        weights = model.bytes_held * copies
        after = left.setdefault(where, free_memory(torch.device(device))) - weights
        room = engine.kv_memory_gib * 2**30 if engine.kv_memory_gib else engine.kv_share * max(0.0, after)
        tokens = int(room / model.kv_bytes_per_token)
        said = f"{engine.model} on {device}: {_gb(weights)} of weights, {_gb(room * copies)} for {tokens:,} tokens"
        left[where] = after - room * copies
        if left[where] < 0:
            advice = "Set a smaller kv_memory_gib, a quantization or model, or fewer replicas."
            yield Finding(role, "problem", f"{said}; {_gb(-left[where])} more than is free", advice)
        elif (window := _window(engine.model)) and tokens < window:
            advice = "Longer prompts are refused. Raise kv_memory_gib."
            yield Finding(role, "warning", f"{said}, less than its window of {window:,}", advice)
        else:
            yield Finding(role, "ok", f"{said}, {_gb(left[where])} left")


def _dtype(engine: EngineConfig, device: str) -> str:
    if engine.dtype != "auto":
        return engine.dtype
    # Both are always with bfloat16 beside them.
    few_bits = device == "cpu" and (engine.quantization != "none" or engine.kv_dtype == "int8")
    return "bfloat16" if few_bits else str(default_dtype(device)).removeprefix("torch.")


def _window(name: str) -> int | None:
    folder = _folder(name)
    if folder is None or not (folder / "config.json").exists():
        return None
    fields: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return next((fields[name] for name in WINDOW_FIELDS if name in fields), None)


def _reservation(config: AppConfig, engines: dict[str, EngineConfig]) -> Iterator[Finding]:
    """What Ray is asked to set apart, beside what it would count on this machine alone."""
    wanted = {"CPU": config.retriever.num_cpus, "GPU": config.retriever.num_gpus}
    for engine in engines.values():
        bundles = engine_bundles(num_cpus=engine.num_cpus, num_gpus=engine.num_gpus, num_ranks=engine.tensor_parallel)
        for kind in wanted:
            wanted[kind] += engine.replicas.min * sum(bundle.get(kind, 0) for bundle in bundles)
    for kind, there in (("CPU", len(os.sched_getaffinity(0))), ("GPU", torch.cuda.device_count())):
        said = f"the configuration reserves {wanted[kind]:g} {kind}s; here are {there}"
        if wanted[kind] > there:
            yield Finding(
                "Ray", "problem", said, f"Set smaller num_{kind.lower()}s, or serve on a cluster that has them."
            )
        elif wanted[kind]:
            yield Finding("Ray", "ok", said)


def _ray() -> Finding:
    address, folder = os.environ.get("RAY_ADDRESS"), Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray"
    if address or (folder / "ray_current_cluster").exists():
        where = f"at {address} (RAY_ADDRESS)" if address else f"on this machine (see {folder})"
        return Finding("Ray", "warning", f"there is a cluster {where}", "serve joins it instead of starting its own.")
    return Finding("Ray", "ok", "serve starts its own, on ports that are free")


def _qdrant(config: RetrieverConfig) -> Finding:
    if config.qdrant_url is None:
        return Finding("Qdrant", "ok", "in the retriever's own process")
    dimension = _dimension(config.embedder)
    if dimension is None:
        return Finding("Qdrant", "warning", f"{config.qdrant_url} was not asked", f"Get {config.embedder} first.")
    folder = _folder(config.embedder)
    own = folder is not None and weighs_words(folder)
    key = config.qdrant_api_key.get_secret_value() if config.qdrant_api_key else os.environ.get("QDRANT_API_KEY")
    try:
        ChunkStore(config.qdrant_url, api_key=key, dimension=dimension, idf=not own).close()
    except RetrievalError as error:
        return Finding("Qdrant", "problem", str(error))
    return Finding("Qdrant", "ok", f"{config.qdrant_url} takes vectors of {dimension}")


def _dimension(embedder: str) -> int | None:
    folder = _folder(embedder)
    config = folder / "config.json" if folder else None
    if config is None or not config.exists():
        return None
    size: int = json.loads(config.read_text(encoding="utf-8"))["hidden_size"]
    return size


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def show(findings: list[Finding]) -> None:
    """A line for each, and what to do under those that are not well."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        colour = COLOURS[finding.status]
        message = escape(finding.message) + (f"\n[dim]→ {escape(finding.advice)}[/dim]" if finding.advice else "")
        table.add_row(f"[{colour}]{finding.status}[/{colour}]", finding.check, message)
    console.print(table)
    problems = sum(finding.status == "problem" for finding in findings)
    console.print(f"\n{problems or 'no'} problem{'' if problems == 1 else 's'}")
