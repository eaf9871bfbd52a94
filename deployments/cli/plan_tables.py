"""What `rapid plan` prints: its report as tables for people, with what is assumed and what does not fit under them."""

from rich.console import Console
from rich.table import Table

from deployments.cli.plan import Report, as_object


def show(report: Report, console: Console) -> None:
    """The report as tables."""
    if not console.is_terminal:
        console.width = max(console.width, 120)
    made, work = as_object(report), report.planner.work
    models = Table(title=f"On {report.gpu}: {work.context:,} tokens of context", title_justify="left")
    for column in ("", "model", "GPUs", "weights GB a GPU", "KV KiB a token", "sequences that fit", "prefill s"):
        models.add_column(column, justify="left" if column in ("", "model") else "right")
    for name, model in made["models"].items():
        models.add_row(
            name,
            model["model"],
            str(model["gpus"]),
            f"{model['weight_bytes_per_gpu'] / 1e9:.2f}",
            f"{model['kv_bytes_per_token_per_gpu'] / 1024:.0f}",
            str(model["sequences_that_fit"]),
            f"{model['prefill_s']:.2f}",
        )
    device = report.planner.device
    models.caption = (
        f"Taken to reach {device.weights:.0%} of the bandwidth with weights, {device.cache:.0%} with keys and values;\n"
        f"{device.products:.0%} of the FLOP/s in products, {device.attention:.0%} in attention. A layer takes "
        f"{device.layer_s * 1e6:.0f} µs more;\n"
        f"on several GPUs, where nothing is captured as a graph, never less than {device.eager_layer_s * 1e6:.0f} µs. "
        f"A round's messages take {2e3 * report.planner.call_s:.1f} ms."
    )
    models.caption_justify = "left"
    console.print(models)
    priced = report.demand.price is not None
    ways = Table(title_justify="left")
    ways.title = (
        f"{work.batch} sequences a target, acceptance {work.acceptance:.0%}, {work.retrieved:,} tokens retrieved"
    )
    for column in ("", "γ", "draft ms", "verify ms", "round ms", "tokens", "tokens/s", "of plain", "R + S", "GPUs"):
        ways.add_column(column, justify="right" if column else "left")
    if priced:
        ways.add_column("a million tokens", justify="right")
    for name, way in made["ways"].items():
        fleet = way["fleet"]
        ways.add_row(
            name,
            str(way["gamma"]),
            *(f"{way[part] * 1e3:.1f}" for part in ("draft_s", "verify_s", "round_s")),
            f"{way['tokens_per_round']:.2f}",
            f"{way['tokens_per_second']:.1f}",
            f"{way['ratio']:.2f}×",
            f"{fleet['targets']} + {fleet['drafters']}",
            str(fleet["gpus"]),
            *([f"{fleet['cost']:.2f}"] if priced else []),
        )
    load = f"{report.users} users" if report.demand.load is None else f"{report.demand.load:g} requests a second"
    ways.caption, ways.caption_justify = f"tokens/s of one sequence; R targets + S drafters for {load}", "left"
    if report.planner.other_gpus:
        ways.caption += f"; {report.planner.other_gpus} of the GPUs is the embedder's"
    console.print(ways)
    if report.ratios:
        console.print(_ratio_table(report))
    for note in report.notes:
        console.print(f"• {note}")


def _ratio_table(report: Report) -> Table:
    overlaps = "with" if report.config.overlap is not False else "without"
    table = Table(title=f"Simulated: {report.users} users, {overlaps} overlap", title_justify="left")
    for column in ("R : S", "γ", "tokens/s in all", "a user", "targets busy", "drafters busy", "drafted for nothing"):
        table.add_column(column, justify="right")
    best = max(report.ratios, key=lambda it: it.tokens_per_second)
    targets, drafters = report.allowed
    beyond = [it for it in report.ratios if it.num_targets > targets or it.num_drafters > drafters]
    if beyond:
        table.caption, table.caption_justify = "* more than replicas.max allows", "left"
    for outcome in report.ratios:
        table.add_row(
            f"{'* ' if outcome in beyond else ''}{outcome.num_targets} : {outcome.num_drafters}",
            str(outcome.gamma),
            f"{outcome.tokens_per_second:.0f}",
            f"{outcome.tokens_per_second_per_user:.1f}",
            *(f"{share:.0%}" for share in (outcome.target_busy, outcome.drafter_busy, outcome.draft_waste)),
            style="bold" if outcome is best else None,
        )
    return table
