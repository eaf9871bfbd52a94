"""`rapid datastore`: builds a datastore of text files for drafts, and says what one holds."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from deployments.cli.inputs import read_document
from deployments.cli.shell_completion import CONFIG, configs, model_names
from rapid.errors import InvalidRequest

datastore = typer.Typer(help="Datastores: texts whose continuations are drafted.", no_args_is_help=True)
MAX_SEGMENT_TOKENS = 2**26  # sorting them takes 2 GB of memory


@datastore.command()
def build(
    files: Annotated[list[Path], typer.Argument(help="UTF-8 text files, or folders of .txt and .md files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the datastore. Its texts stay.")],
    target: Annotated[
        str | None, typer.Option(help="The model whose tokens these are; else the config's.", **model_names)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help=f"Whose target counts.  [default: {CONFIG}, where there is one]", **configs)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Build a datastore of text files, or add files to one. A file that is there already is replaced.

    `datastore.path` of the configuration then names the folder.

    [dim]rapid datastore build manuals/ --out datastore[/dim]
    """
    from deployments.config import AppConfig, read_config
    from rapid.datastore.folder import DatastoreFolder
    from rapid.text.encoding import encode_in_pieces
    from rapid.text.tokenizer import fingerprint, load_tokenizer

    paths = [path for named in files for path in _texts_in(named)]
    if target is None:
        config = config or (CONFIG if CONFIG.exists() else None)
        target = (read_config(config) if config else AppConfig()).target.model
    started = time.perf_counter()
    tokenizer = load_tokenizer(target)
    folder = DatastoreFolder(out, fingerprint(tokenizer), max_segment_tokens=MAX_SEGMENT_TOKENS)
    for path in paths:
        print(f"rapid: {path}", file=sys.stderr)
        folder.add(str(path.resolve()), encode_in_pieces(tokenizer, read_document(path)))
    _show(out, as_json, {"seconds": round(time.perf_counter() - started, 2)})


@datastore.command()
def info(
    folder: Annotated[Path, typer.Argument(help="The folder of a datastore.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a datastore holds: texts, tokens, bytes, and the tokenizer that it is for."""
    _show(folder, as_json, {})


def _texts_in(named: Path) -> list[Path]:
    if not named.is_dir():
        return [named]
    found = sorted(path for path in named.rglob("*") if path.suffix in (".txt", ".md"))
    if not found:
        raise InvalidRequest(f"{named} holds no .txt and no .md file")
    return found


def _show(path: Path, as_json: bool, more: dict[str, float]) -> None:
    from rapid.datastore.folder import DatastoreFolder

    held = DatastoreFolder(path).info()
    if not held.num_texts:
        raise InvalidRequest(f"{path} holds no datastore: make one with `rapid datastore build`")
    rows = {"folder": str(path)} | {name.removeprefix("num_"): value for name, value in held._asdict().items()} | more
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        for name, value in rows.items():
            print(f"{name:<12}{f'{value:,}' if isinstance(value, int) else value}")
