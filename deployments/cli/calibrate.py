"""`rapid retrieval calibrate`: learns what an embedder's scores mean."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from deployments.cli.shell_completion import CONFIG, configs

retrieval = typer.Typer(help="The retriever, without a model that writes.", no_args_is_help=True)


@retrieval.callback()
def _retrieval() -> None: ...


@retrieval.command()
def calibrate(
    questions: Annotated[
        Path, typer.Argument(help="JSON lines with `question`, `context`, and `passage`, a piece of the context.")
    ],
    config: Annotated[Path, typer.Option(help="A Ray Serve config file, for its retriever.", **configs)] = CONFIG,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the report and keep nothing.")] = False,
) -> None:
    """Learn the embedder's threshold and confidence from questions whose passages are known.

    The numbers are kept in the embedder's folder, where the retriever reads them when it starts. The report goes to
    stdout: it holds the questions that nothing was learned from against what was learned.
    """
    from deployments.builders import build_retriever
    from deployments.config import AppConfig, read_config
    from rapid.errors import InvalidRequest
    from rapid.weights import embedded_models
    from retrieval import calibration
    from retrieval.embedding import model_folder

    known = calibration.read_questions(questions)
    settings = read_config(config) if config != CONFIG or config.exists() else AppConfig()
    alone = settings.retriever.model_copy(update={"qdrant_url": None, "reranker": None})
    retriever = build_retriever(alone, None, settings.target.model)
    print(f"rapid: asking {len(known)} questions", file=sys.stderr)
    try:
        learned = calibration.calibrate(calibration.observe(retriever, known, alone.options))
    except ValueError as error:
        raise InvalidRequest(f"{questions}: {error}") from error
    print(json.dumps(learned.as_json(), indent=1))
    if not dry_run:
        folder = model_folder(embedded_models.resolve(alone.embedder))
        print(f"rapid: kept in {calibration.save_calibration(learned, folder)}", file=sys.stderr)
