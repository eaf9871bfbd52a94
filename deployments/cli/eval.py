"""`rapid eval`: quality and speed in one table."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployments.cli.shell_completion import CONFIG, configs, one_of
from rapid.errors import InvalidRequest
from rapid.strategies import STRATEGIES

if TYPE_CHECKING:
    from deployments.config import AppConfig

evaluation = typer.Typer()


@evaluation.command("eval")
def evaluate(
    tasks: Annotated[
        list[str] | None, typer.Option(help="Names, with options: nq:depth=0.5,qmsum. Separated by commas; repeatable.")
    ] = None,
    strategies: Annotated[
        list[str] | None, typer.Option(help=f"{one_of(STRATEGIES)} Separated by commas; repeatable.")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="The paper's tables, and their small forms for embedded models: see the manual.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="An evaluation as YAML, instead of tasks and strategies.")] = None,
    recommend: Annotated[
        Path | None, typer.Option(help="Your own questions, a JSON object a line: how to serve them best.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder of all answers and results. It is gone on with.")
    ] = Path("evaluation"),
    temperature: Annotated[list[float] | None, typer.Option(help="Repeatable.  [default: 0]")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The most questions of a task.")] = None,
    context_tokens: Annotated[
        int | None, typer.Option(min=64, help="The most tokens of a prompt; else as the benchmark says.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Which questions, and of all that is sampled.  [default: 0]")] = None,
    data: Annotated[Path | None, typer.Option(help="A benchmark's file, or a folder of benchmarks' files.")] = None,
    from_hub: Annotated[bool, typer.Option("--from-hub", help="Download data that is not there.")] = False,
    url: Annotated[
        list[str] | None, typer.Option(help="A running server, or NAME=URL, instead of models here. Repeatable.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Of that server; else the first that it names.")] = None,
    serve_config: Annotated[
        Path | None,
        typer.Option(help=f"Whose `args` say the models here.  [default: {CONFIG}, where there is one]", **configs),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Answers at a time. Speeds are only comparable at 1.  [default: 1]")
    ] = None,
    judge_url: Annotated[str | None, typer.Option(help="A server whose model rates answers.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="Of that server; else the first that it names.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON instead of tables.")] = False,
) -> None:
    """Ask tasks with several strategies, and compare quality and speed question by question.

    Answers are kept as they come: a run that was ended goes on when it is started
    again. The output folder holds answers.jsonl, summary.json, pictures and
    report.html, in which single questions can be looked at.

    [dim]rapid eval --tasks nq,qmsum --strategies autoregressive,rag,rapid --limit 50 --data benchmarks/[/dim]
    [dim]rapid eval --suite eta --data benchmarks/ --output eta[/dim]
    [dim]rapid eval --recommend questions.jsonl[/dim]
    """
    from deployments.evaluation.config import Evaluation, parse_evaluation, read_evaluation
    from deployments.evaluation.task import EvaluationError

    said = {
        "temperatures": temperature,
        "limit": limit,
        "context_tokens": context_tokens,
        "seed": seed,
        "data": data,
        "from_hub": from_hub or None,
        "concurrency": concurrency,
        "judge_url": judge_url,
        "judge_model": judge_model,
    }
    if sum(way is not None for way in (tasks, suite, config, recommend)) != 1:
        raise InvalidRequest("one of --tasks, --suite, --config and --recommend is needed; see rapid eval --help")
    try:
        asked: Evaluation
        if config is not None:
            asked = read_evaluation(config, **said)
        elif suite is not None:
            from deployments.evaluation.suites import suite_of

            asked = parse_evaluation(suite_of(suite, _args(serve_config)) | _given(said), source=f"suite {suite}")
        elif recommend is not None:
            from deployments.evaluation.recommend import candidates

            fields = candidates(recommend, _args(serve_config), is_judged=judge_url is not None)
            asked = parse_evaluation(fields | _given(said), source="--recommend")
        else:
            fields = {"tasks": [{"name": name} for name in _specs(tasks or [])]}
            fields |= _systems_and_rows(
                url or [], model, serve_config, _split(strategies or ["autoregressive,rag,rapid"])
            )
            asked = parse_evaluation(fields | _given(said), source="rapid eval")
        _run(asked, output, as_json=as_json, advises=recommend is not None)
    except EvaluationError as error:
        raise InvalidRequest(str(error)) from error


def _run(asked: Any, output: Path, *, as_json: bool, advises: bool) -> None:
    from deployments.cli.eval_terminal import EvalTerminal
    from deployments.evaluation.evaluate import evaluate

    terminal = EvalTerminal()
    with terminal:
        summary = asyncio.run(evaluate(asked, output, terminal))
    if as_json:
        print(json.dumps(summary.as_object(), indent=1))
    else:
        terminal.show(summary, output)
    if advises:
        from deployments.evaluation.recommend import advice

        print(advice(summary))


def _args(serve_config: Path | None) -> AppConfig:
    from deployments.config import AppConfig, read_config

    if serve_config is None and CONFIG.exists():
        serve_config = CONFIG
    return read_config(serve_config) if serve_config else AppConfig()


def _given(said: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in said.items() if value is not None}


def _systems_and_rows(
    urls: list[str], model: str | None, serve_config: Path | None, strategies: list[str]
) -> dict[str, Any]:
    """Each strategy is a row of each system; the first is the target alone, with which the others are compared."""
    from deployments.evaluation.config import HERE, LC

    strategies = ["autoregressive", *(name for name in strategies if name != "autoregressive")]
    systems: dict[str, Any] = {}
    for named in urls:
        name, _, url = named.rpartition("=") if not named.startswith("http") else ("", "", named)
        systems[name or url.partition("://")[2].partition("/")[0]] = {"url": url} | ({"model": model} if model else {})
    fields: dict[str, Any] = {"tokenizer": _args(serve_config).target.model}
    if not systems:
        systems = {HERE: {"args": _args(serve_config)}}
    rows = []
    for system in systems:
        suffix = "" if len(systems) == 1 else f" at {system}"
        for strategy in strategies:
            name = LC if strategy == "autoregressive" else strategy
            rows.append(
                {
                    "name": name + suffix,
                    "system": system,
                    "rapid": {"strategy": strategy},
                    "baseline": LC + suffix,
                }
            )
    return fields | {"systems": systems, "rows": rows}


def _split(values: list[str]) -> list[str]:
    return [name.strip() for value in values for name in value.split(",") if name.strip()]


def _specs(values: list[str]) -> list[str]:
    """The tasks; what follows a comma and is no task but an option belongs to the task before it."""
    specs: list[str] = []
    for piece in _split(values):
        is_option = "=" in piece.partition(":")[0]
        if is_option and specs:
            specs[-1] += f",{piece}"
        else:
            specs.append(piece)
    return specs
