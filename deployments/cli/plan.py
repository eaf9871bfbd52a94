"""`rapid plan`: what a configuration would do on GPUs that are not here. Arithmetic and a simulation, no model."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.capacity.devices import GPUS, Device
from cluster.capacity.planner import USABLE_MEMORY, Fleet, Planner, Round, Workload
from cluster.capacity.shapes import ModelShape, ServedModel, known_shape
from cluster.capacity.simulation import GAMMAS, Outcome, Setup, every_ratio
from deployments.config import AppConfig, ConfigError
from deployments.engine_config import EngineConfig
from rapid.errors import InvalidRequest

# Of a weight, by quantization; in four bits with the scale and offset of 64 weights on CUDA, of 32 on a CPU.
WEIGHT_BYTES = {"int8": 1.0, "fp8": 1.0, "int4": 0.5625}
CPU_WEIGHT_BYTES = WEIGHT_BYTES | {"int4": 0.625}
NUMBER_BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}
KV_BYTES = {"int8": (1, 4), "fp8": (1, 0)}  # of a stored number, and of the scale of a head's key or value
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
    """A plan: each way of decoding with the fleet that the load takes, and the simulated ratios of R targets to S
    drafters.
    """

    gpu: str
    config: AppConfig
    demand: Demand
    planner: Planner
    ways: dict[str, tuple[Round, Fleet]]
    users: int
    ratios: list[Outcome]
    notes: list[str]  # what the configuration does not allow, and what is left out

    @property
    def allowed(self) -> tuple[int, int]:
        """Targets and drafters that replicas.max allows."""
        return self.config.target.replicas.max, self.config.drafter.replicas.max


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
        return ModelShape.from_config(AutoConfig.from_pretrained(model, trust_remote_code=False).to_dict())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model}: its config.json is of no use: {error}") from error


def served(engine: EngineConfig) -> ServedModel:
    """What the engine holds; on a GPU, unless its device is the CPU."""
    number_bytes = NUMBER_BYTES[engine.dtype]
    by_scheme = CPU_WEIGHT_BYTES if engine.device == "cpu" else WEIGHT_BYTES
    weight_bytes = by_scheme.get(engine.quantization, float(number_bytes))
    kv_bytes, scale_bytes = KV_BYTES.get(engine.kv_dtype, (number_bytes, 0))
    return ServedModel(
        shape_of(engine.model),
        weight_bytes,
        number_bytes,
        engine.tensor_parallel,
        num_stages=engine.num_stages,
        kv_number_bytes=kv_bytes,
        kv_scale_bytes=scale_bytes,
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
        chunk=config.target.batch_tokens("cuda"),
        target_kv_bytes=_kv_bytes(config.target),
        drafter_kv_bytes=_kv_bytes(config.drafter),
        other_gpus=math.ceil(config.retriever.num_gpus),
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
    report = Report(gpu, config, demand, planner, ways, users, [], [])
    _note_limits(report)
    _simulate_ratios(report, best[1])
    return report


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


def _note_limits(report: Report) -> None:
    """Says of each way of decoding what replicas.max does not allow, and what would be carried with it."""
    planner, (targets, drafters) = report.planner, report.allowed
    for name, (round, fleet) in report.ways.items():
        if fleet.targets <= targets and fleet.drafters <= drafters:
            continue
        takes, allows = f"{fleet.targets} + {fleet.drafters}", f"{targets} + {drafters if fleet.drafters else 0}"
        carried = planner.users_carried(round, targets, drafters)
        report.notes.append(
            f"{name}: this takes {takes} replicas; replicas.max allows {allows}, which carry {carried} users at a time"
        )


def _simulate_ratios(report: Report, fleet: Fleet) -> None:
    """Every R:S, at least one of each, of the fleet's GPUs; or of those that the configuration allows, if fewer."""
    planner, config = report.planner, report.config
    if planner.drafter is None:
        report.notes.append("no ratio of targets to drafters: the target drafts for itself")
        return
    sizes = planner.target.num_devices, planner.drafter.num_devices
    needed = max(fleet.gpus - planner.other_gpus, sum(sizes))
    allowed = planner.engine_gpus(*report.allowed)
    gpus = min(needed, MAX_SIMULATED_GPUS)
    if sum(sizes) < allowed < gpus:
        gpus = allowed
    if gpus < sum(sizes):
        report.notes.append(f"no ratio is simulated: one target and one drafter take more than {gpus} GPUs")
        return
    if gpus < needed:
        why = "replicas.max allows" if gpus == allowed else "are simulated at most"
        report.notes.append(f"ratios are of the {gpus} GPUs that {why}, and not of {needed}")
    given = config.speculation.fixed_draft_tokens
    setup = Setup(
        num_users=report.users,
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
    rounds, gammas = max(5, SIMULATED_ROUNDS // report.users), GAMMAS if given is None else (given,)
    report.ratios.extend(
        every_ratio(setup, gpus, target_gpus=sizes[0], drafter_gpus=sizes[1], gammas=gammas, rounds=rounds)
    )


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
        "notes": report.notes,
    }
