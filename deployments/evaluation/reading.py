"""Reads a benchmark's data: a local file in the benchmark's own format, or the hub's copy where the user allows it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deployments.evaluation.task import EvaluationError, TaskSettings


class Source(NamedTuple):
    """Where a benchmark's data is: its usual file names, and the data set (repository, file) of the hub, if any."""

    names: tuple[str, ...]
    hub: tuple[str, str] | None = None


def find(source: Source, task: str, settings: TaskSettings) -> Path:
    """The file of ``task``: ``settings.data``, or the first of the usual names in that folder, or the hub's.

    Raises:
        EvaluationError: there is none, or the hub does not give it.
    """
    usual = " or ".join(source.names)
    if settings.data is None:
        if source.hub is None:
            raise EvaluationError(f"task {task}: it needs a file; give one with --data ({usual}, or its folder)")
        if not settings.from_hub:
            raise EvaluationError(
                f"task {task}: it needs a file; give one with --data ({usual}, or its folder), or allow the "
                f"download of {source.hub[0]} with --from-hub"
            )
        return _downloaded(*source.hub, task)
    if settings.data.is_dir():
        found = next((path for name in source.names for path in sorted(settings.data.glob(name))), None)
        if found is None:
            raise EvaluationError(f"task {task}: {settings.data} has no {usual}")
        return found
    if not settings.data.is_file():
        raise EvaluationError(f"task {task}: there is no file {settings.data}")
    return settings.data


def text(path: Path) -> str:
    """The text of a file, which may be compressed as .gz.

    Raises:
        EvaluationError: it is no UTF-8 text.
    """
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: {error}") from error


def records(path: Path, fields: Iterable[str]) -> list[dict[str, Any]]:
    """The objects of a .json file (a list) or of one with an object on each line; every one has all ``fields``.

    Raises:
        EvaluationError: a line is no such object; the message says which.
    """
    content = text(path)
    if content.lstrip().startswith("["):
        rows = list(enumerate(_parsed(content, str(path)), start=1))
    else:
        lines = [(i, line) for i, line in enumerate(content.split("\n"), start=1) if line.strip()]
        rows = [(i, _parsed(line, f"{path}, line {i}")) for i, line in lines]
    for i, row in rows:
        missing = [field for field in fields if not isinstance(row, dict) or field not in row]
        if missing:
            raise EvaluationError(f"{path}, record {i}: it has no field {', '.join(missing)}")
    if not rows:
        raise EvaluationError(f"{path}: it is empty")
    return [row for _, row in rows]


def as_texts(value: Any) -> tuple[str, ...]:
    """A field that is one answer or a list of them."""
    values: Sequence[Any] = value if isinstance(value, list) else [value]
    return tuple(str(one) for one in values)


def _parsed(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise EvaluationError(f"{where}: it is no JSON: {error}") from error


def _downloaded(repository: str, name: str, task: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except (HfHubHTTPError, OSError) as error:
        raise EvaluationError(f"task {task}: {repository} could not be downloaded: {error}") from error
