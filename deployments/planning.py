"""`rapid plan`: what a configuration would do on GPUs that are not here. Arithmetic and a simulation, no model."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.devices import GPUS, Device
from cluster.plan import USABLE_MEMORY, Fleet, Planner, Round, Workload
from cluster.shapes import ModelShape, ServedModel, known_shape
from cluster.simulation import GAMMAS, Outcome, Setup, every_ratio
from deployments.config import AppConfig, ConfigError, EngineConfig
from rapid.errors import InvalidRequest

WEIGHT_BYTES = {"int8": 1.0, "fp8": 1.0, "int4": 0.625}  # int4 with its scale and zero
NUMBER_BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}
MAX_SIMULATED_GPUS = 32
SIMULATED_ROUNDS = 3000  # of all users together


@dataclass(frozen=True)
class Demand:
    """What `rapid plan` is asked. ``retrieved``, ``batch`` None: as the configuration has them.

    The load is ``users`` answers being written at any moment, or ``load`` requests a second; neither means one full
    target. ``price`` is of one GPU for an hour.
    """

    context: int
    acceptance: float
    new_tokens: int
    retrieved: int | None = None
    batch: int | None = None
    users: int | None = None
    load: float | None = None
    price: float | None = None


@dataclass(frozen=True)
class Report:
    """A plan: each way of decoding with its fleet, and the simulated ratios of that many GPUs."""

    gpu: str
    config: AppConfig
    demand: Demand
    planner: Planner
    ways: dict[str, tuple[Round, Fleet]]
    users: int
    ratios: list[Outcome]


def device_of(gpu: str) -> Device:
    """A GPU by name, or a measured machine from the file that `python -m benchmarks.plan` writes."""
    if gpu.lower() in GPUS:
        return GPUS[gpu.lower()]
    if not gpu.endswith(".json"):
        raise InvalidRequest(f"--gpu: {gpu} is none of {', '.join(GPUS)}, and no .json file of a measured machine")
    try:
        return Device(**json.loads(Path(gpu).read_text(encoding="utf-8"))["device"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"--gpu: {gpu} holds no measured device: {type(error).__name__}: {error}") from error


def shape_of(model: str) -> ModelShape:
    """The shape of a well-known model by its name; of any other by its config.json, from its folder or the hub.

    Raises:
        ConfigError: there is no such config, or this arithmetic does not describe it.
    """
    shape = known_shape(model)
    if shape is not None:
        return shape
    from transformers import AutoConfig

    try:
        return ModelShape.from_config(AutoConfig.from_pretrained(model).to_dict())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model}: its config.json is of no use: {error}") from error


def served(engine: EngineConfig) -> ServedModel:
    number_bytes = NUMBER_BYTES[engine.dtype]
    weight_bytes = WEIGHT_BYTES.get(engine.quantization, float(number_bytes))
    return ServedModel(
        shape_of(engine.model), weight_bytes, number_bytes, engine.tensor_parallel, num_stages=engine.num_stages
    )


def _kv_bytes(engine: EngineConfig) -> float | None:
    """On each device: the ranks of a group have as much each, and the stages of one process share it."""
    return None if engine.kv_memory_gib is None else engine.kv_memory_gib * 2**30 / engine.num_stages


def make_report(config: AppConfig, gpu: str, demand: Demand) -> Report:
    """Plans for ``config`` on ``gpu``.

    Raises:
        InvalidRequest: an unknown GPU, or a batch that has no room.
        ConfigError: the weights have no room.
    """
    device = device_of(gpu)
    drafter = None if config.colocated else served(config.drafter)
    retrieved = demand.retrieved or round(config.retriever.options.budget(demand.context))
    batch = demand.batch or config.target.max_sequences
    work = Workload(demand.context, retrieved, batch, demand.acceptance, demand.new_tokens)
    planner = Planner(
        device,
        served(config.target),
        drafter,
        work,
        chunk=config.target.max_batch_tokens,
        target_kv_bytes=_kv_bytes(config.target),
        drafter_kv_bytes=_kv_bytes(config.drafter),
    )
    seats = _seats(planner, config, gpu)
    if demand.batch and demand.batch > seats:
        raise InvalidRequest(f"--batch: {demand.batch} sequences of {demand.context} tokens have no room; {seats} have")
    if batch > seats:
        planner = replace(planner, work=replace(work, batch=seats))
    given = config.speculation.fixed_draft_tokens

    def drafted(*, overlap: bool) -> Round:
        return planner.best_round(overlap=overlap) if given is None else planner.round(given, overlap=overlap)

    rounds = {"plain": planner.round(0), "in turn": drafted(overlap=False)}
    if drafter is not None:
        rounds["overlapped"] = drafted(overlap=True)
    users = demand.users or planner.work.batch

    def fleet(round: Round) -> Fleet:
        if demand.load is not None:
            return planner.fleet_for_load(round, demand.load, demand.price)
        return planner.fleet_for_users(round, users, demand.price)

    ways = {name: (round, fleet(round)) for name, round in rounds.items()}
    best = max(ways.values(), key=lambda way: way[0].tokens_per_second)
    if demand.load is not None:  # those that write at the same moment
        users = max(1, best[1].targets * planner.work.batch)
    return Report(gpu, config, demand, planner, ways, users, _ratios(planner, config, best[1], users))


def _seats(planner: Planner, config: AppConfig, gpu: str) -> int:
    usable = planner.device.memory * USABLE_MEMORY
    for name, engine, model in (
        ("target", config.target, planner.target),
        ("drafter", config.drafter, planner.drafter),
    ):
        if model is not None and model.bytes_held > usable:
            field = "num_gpus" if engine.device_map else "tensor_parallel"
            raise ConfigError(
                f"{name}: {model.bytes_held / 1e9:.1f} GB of weights for each GPU, and {gpu} has {usable / 1e9:.1f} GB "
                f"to use; {field} must be at least {math.ceil(model.bytes_held * model.num_devices / usable)}"
            )
    if planner.target_seats < 1 or planner.drafter_seats < 1:
        raise ConfigError(
            f"no room on {gpu} for the keys and values of one sequence: raise kv_memory_gib or tensor_parallel"
        )
    return planner.target_seats


def _ratios(planner: Planner, config: AppConfig, fleet: Fleet, users: int) -> list[Outcome]:
    """Every R:S of the fleet's GPUs, at least one of each; nothing where the target drafts, or there are too many."""
    if planner.drafter is None:
        return []
    sizes = planner.target.num_devices, planner.drafter.num_devices
    gpus = max(fleet.gpus, sum(sizes))
    if gpus > MAX_SIMULATED_GPUS:
        return []
    given = config.speculation.fixed_draft_tokens
    setup = Setup(
        num_users=users,
        num_targets=1,
        num_drafters=1,
        gamma=1,
        acceptance=planner.work.acceptance,
        verify_s=planner.verify_s,
        draft_s=planner.draft_s,
        overlap=config.overlap is not False,
        target_seats=planner.target_seats,
        drafter_seats=planner.drafter_seats,
        call_s=planner.call_s,
    )
    rounds, gammas = max(5, SIMULATED_ROUNDS // users), GAMMAS if given is None else (given,)
    return every_ratio(setup, gpus, target_gpus=sizes[0], drafter_gpus=sizes[1], gammas=gammas, rounds=rounds)


def as_object(report: Report) -> dict[str, Any]:
    """The report as JSON has it: bytes, seconds, tokens."""
    planner = report.planner
    models: dict[str, Any] = {}
    for name, engine, model, seats, prefill_s in (
        ("target", report.config.target, planner.target, planner.target_seats, planner.target_prefill_s),
        ("drafter", report.config.drafter, planner.drafter, planner.drafter_seats, planner.draft_prefill_s),
    ):
        if model is not None:
            models[name] = {
                "model": engine.model,
                "parameters": model.shape.num_parameters,
                "gpus": model.num_devices,
                "weight_bytes_per_gpu": round(model.bytes_held),
                "kv_bytes_per_token_per_gpu": round(model.kv_bytes_per_token),
                "sequences_that_fit": seats,
                "prefill_s": prefill_s,
            }
    ways = {
        name: {
            "gamma": round.gamma,
            "draft_s": round.gamma * round.draft_s,
            "verify_s": round.verify_s,
            "round_s": round.round_s,
            "tokens_per_round": round.tokens,
            "tokens_per_second": round.tokens_per_second,
            "ratio": round.tokens_per_second / report.ways["plain"][0].tokens_per_second,
            "fleet": asdict(fleet),
        }
        for name, (round, fleet) in report.ways.items()
    }
    return {
        "gpu": report.gpu,
        "device": asdict(planner.device),
        "workload": asdict(planner.work) | {"users": report.users, "load": report.demand.load},
        "models": models,
        "ways": ways,
        "ratios": [asdict(outcome) for outcome in report.ratios],
    }


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
        f"{device.products:.0%} of the FLOP/s in products, {device.attention:.0%} in attention."
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
    console.print(ways)
    if report.ratios:
        console.print(_ratio_table(report))


def _ratio_table(report: Report) -> Table:
    overlaps = "with" if report.config.overlap is not False else "without"
    table = Table(title=f"Simulated: {report.users} users, {overlaps} overlap", title_justify="left")
    for column in ("R : S", "γ", "tokens/s in all", "a user", "targets busy", "drafters busy", "drafted for nothing"):
        table.add_column(column, justify="right")
    best = max(report.ratios, key=lambda it: it.tokens_per_second)
    for outcome in report.ratios:
        table.add_row(
            f"{outcome.num_targets} : {outcome.num_drafters}",
            str(outcome.gamma),
            f"{outcome.tokens_per_second:.0f}",
            f"{outcome.tokens_per_second_per_user:.1f}",
            *(f"{share:.0%}" for share in (outcome.target_busy, outcome.drafter_busy, outcome.draft_waste)),
            style="bold" if outcome is best else None,
        )
    return table
