"""The arithmetic of `rapid plan` against measurements on this machine: single passes, whole prefills, and decoding.

This machine's constants are fitted to the passes of steps.json at every other context, and predict the rest. There is
one fit for the compiled kernels and one for PyTorch's in float32, as if they were different machines. The picture is
the simulation's: tokens a second over the ratio of targets to drafters. `python -m benchmarks.rounds` tests the round
model with costs of the same run; this command tests it with costs of another run, and with drafting ahead.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import rapid  # noqa: F401 (before torch)

# isort: split
from benchmarks.common.local import config
from benchmarks.common.results import FOLDER, read, write
from cluster.capacity.devices import GPUS, Device
from cluster.capacity.planner import Planner, Round, Workload
from cluster.capacity.shapes import SHAPES, ServedModel
from cluster.capacity.simulation import Setup, every_ratio
from deployments.cli.plan import WEIGHT_BYTES

SMOL, LLAMA = SHAPES["smollm2-135m"], SHAPES["llama-3.1-8b"]
SERVED = {
    "float32": ServedModel(SMOL, 4.0, 4),
    "bfloat16": ServedModel(SMOL),
    "int8": ServedModel(SMOL, 1.0),
    "int4": ServedModel(SMOL, 0.625),
}
PASSES = {"plain step": 1, "verify 5": 5, "verify 11": 11}
COMPILED = ("bfloat16", "int8", "int4")
FITTED = ("flops", "weights", "cache", "attention", "layer_s")  # `products` stays 1: flops is the rate of products
SHARES = ("weights", "cache")  # of the bandwidth, so at most 1
HELD_OUT = (1024, 7000, 32768)
RATIO_ROUNDS = 20


@dataclass(frozen=True)
class Pass:
    weights: str
    context: int
    tokens: int
    measured_s: float

    def error(self, device: Device) -> float:
        """Predicted ÷ measured - 1."""
        return device.pass_s(SERVED[self.weights], 1, self.tokens, self.context) / self.measured_s - 1


def fit(device: Device, passes: Sequence[Pass], constants: Sequence[str] = FITTED) -> Device:
    """The ``constants`` with the least mean squared logarithm of predicted ÷ measured, fitted one after another."""

    def loss(candidate: Device) -> float:
        return statistics.mean(math.log1p(one.error(candidate)) ** 2 for one in passes)

    def moved(name: str, factor: float) -> Device:
        value = getattr(device, name) * factor
        return replace(device, **{name: min(1.0, value) if name in SHARES else value})

    step = 2.0
    while step > 1.001:
        tried = [moved(name, factor) for name in constants for factor in (step, 1 / step)]
        better = min(tried, key=loss)
        if loss(better) < loss(device):
            device = better
        else:
            step = math.sqrt(step)
    return device


def summary(errors: Sequence[float]) -> dict[str, float]:
    """The absolute values of predicted ÷ measured - 1."""
    sizes = [abs(error) for error in errors]
    return {
        "predictions": len(sizes),
        "median_error": round(statistics.median(sizes), 4),
        "worst_error": round(max(sizes), 4),
    }


def fit_kernels(guess: Device, passes: Sequence[Pass]) -> dict[str, Device]:
    """This machine as a device for each weight format.

    The overhead of a layer is fitted with the compiled kernels, whose formats differ in the bytes they read. Passes in
    float32 alone cannot separate it from the reading of the weights, so their device uses the same overhead.
    """
    compiled = fit(guess, [one for one in passes if one.weights in COMPILED])
    others = [name for name in FITTED if name != "layer_s"]
    float32 = fit(replace(guess, layer_s=compiled.layer_s), [one for one in passes if one.weights == "float32"], others)
    return dict.fromkeys(COMPILED, compiled) | {"float32": float32}


def check_passes() -> tuple[dict[str, Device], dict[str, Any]]:
    """This machine for each weight format, and the errors at the contexts that were not fitted."""
    steps = read("steps")
    passes = [
        Pass(row["weights"], row["context"], tokens, row[name] / 1e3)
        for row in steps["rows"]
        for name, tokens in PASSES.items()
        if name in row
    ]
    memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    bandwidth = 1e9 * max(row["gb_per_s"] for row in steps["rows"])
    guess = Device(memory, bandwidth, 1e11, weights=0.5, cache=0.2, products=1.0, attention=0.5)
    fitted_to = [one for one in passes if one.context not in HELD_OUT]
    held_out = [one for one in passes if one.context in HELD_OUT]
    devices = fit_kernels(replace(guess, layer_s=3e-4), fitted_to)

    def errors(passes: Sequence[Pass]) -> dict[str, float]:
        return summary([one.error(devices[one.weights]) for one in passes])

    results: dict[str, Any] = {
        "fitted_to": errors(fitted_to),
        "held_out": errors(held_out),
        "held_out compiled": errors([one for one in held_out if one.weights in COMPILED]),
        "held_out float32": errors([one for one in held_out if one.weights == "float32"]),
        "rows": [asdict(one) | {"error": round(one.error(devices[one.weights]), 4)} for one in held_out],
    }
    for kind, tokens in PASSES.items():
        results[f"held_out {kind}"] = errors([one for one in held_out if one.tokens == tokens])
    return devices, results


def check_prefill(device: Device) -> dict[str, Any]:
    """Whole prefills, which were not fitted; retrieval and a drafter's prefill ran beside those of serving.json."""
    measured = [(6948, "serving", row["prefill_tokens_per_second"]) for row in read("serving")["shared_prefix"]["rows"]]
    for name in ("decode", "decode_450"):
        read_s = [row for row in read(name)["rows"] if "prefill_tokens_per_second" in row]
        measured += [(read_s[0]["prompt_tokens"], name, read_s[0]["prefill_tokens_per_second"])]
    rows = []
    for tokens, name, speed in measured:
        predicted = tokens / device.prefill_s(SERVED["bfloat16"], tokens, config().target.batch_tokens("cpu"))
        rows.append({"tokens": tokens, "from": name, "predicted": round(predicted, 1), "measured": speed})
    return summary([row["predicted"] / row["measured"] - 1 for row in rows]) | {"rows": rows}


def check_decoding(device: Device) -> dict[str, Any]:
    """The chosen γ of decode.json: its rounds and drafts, with plain decoding's cost there and ``device``'s ratios.

    The costs come from another run, on a machine whose speed changes, and from passes alone.
    """
    plain = device.pass_s(SERVED["bfloat16"], 1, 1, 7000)
    draft = device.pass_s(SERVED["int4"], 1, 1, 1024) / plain
    extra = (device.pass_s(SERVED["bfloat16"], 1, 5, 7000) / plain - 1) / 4  # the cost of verifying one more token
    errors: dict[str, list[float]] = {"lookup": [], "rapid": []}
    for row in read("decode")["rows"]:
        for strategy, found in errors.items():
            seen = row[strategy]
            by_model = seen["drafted"] - seen["lookup_drafted"]
            plain_steps = seen["rounds"] + extra * seen["drafted"] + draft * by_model
            predicted = seen["emitted"] / plain_steps * row["autoregressive"]["tokens_per_second"]
            found.append(predicted / seen["tokens_per_second"] - 1)
    return {strategy: summary(found) for strategy, found in errors.items()}


def check_overlap(overlap: dict[str, Any]) -> dict[str, float]:
    """Drafting ahead, on ÷ off: the round model's prediction from both runs' costs, against the measurement.

    Each side has the means of a round's parts: ``mean_draft_ms`` (all of its draft), ``mean_verify_ms`` and
    ``mean_transport_ms``; the side that is on also has ``hit_rate``. The cost of a draft is that of the side that is
    off, where the drafter runs alone. The cost of a verification during a draft is that of the side that is on, since
    here both engines read the same memory. ``predicted_apart`` is for engines that do not slow each other down.
    """
    gamma, on, off = overlap["draft_tokens"], overlap["on"], overlap["off"]
    acceptance = overlap["hit_rate"] ** (1 / (gamma + 1))

    def speed(ahead: bool, verify: dict[str, float], side: dict[str, float]) -> float:
        draft_s = off["mean_draft_ms"] / gamma / 1e3
        call_s = side["mean_transport_ms"] / 2e3
        modelled = Round(gamma, acceptance, draft_s, verify["mean_verify_ms"] / 1e3, overlap=ahead, call_s=call_s)
        return modelled.tokens_per_second

    in_turn = speed(False, off, off)
    predicted, measured = speed(True, on, on) / in_turn, overlap["median_ratio"]
    return {
        "measured": measured,
        "predicted": round(predicted, 3),
        "error": round(abs(predicted / measured - 1), 4),
        "predicted_apart": round(speed(True, off, off) / in_turn, 3),
    }


def simulate_ratios(num_gpus: int, num_users: int) -> list[dict[str, Any]]:
    """Llama-3.1-8B at 122K on H200s, with its int4 copy as the drafter: every R:S, with overlap and without."""
    outcomes = []
    for acceptance in (0.6, 0.8, 0.9):
        planner = Planner(
            GPUS["h200"],
            ServedModel(LLAMA),
            ServedModel(LLAMA, WEIGHT_BYTES["int4"]),
            Workload(122_000, 5_120, 8, acceptance),
        )
        for overlap in (False, True):
            setup = Setup(
                num_users=num_users,
                num_targets=1,
                num_drafters=1,
                gamma=1,
                acceptance=acceptance,
                verify_s=planner.verify_s,
                draft_s=planner.draft_s,
                overlap=overlap,
                target_seats=planner.target_seats,
                drafter_seats=planner.drafter_seats,
            )
            for outcome in every_ratio(setup, num_gpus, rounds=RATIO_ROUNDS):
                outcomes.append({"acceptance": acceptance, "overlap": overlap} | asdict(outcome))
    return outcomes


def draw(outcomes: Sequence[dict[str, Any]], num_gpus: int, num_users: int) -> None:
    """Tokens a second in all over R:S: benchmarks/results/plan.svg."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for colour, acceptance in zip(("C0", "C1", "C2"), (0.6, 0.8, 0.9), strict=True):
        for overlap in (False, True):
            line = [row for row in outcomes if (row["acceptance"], row["overlap"]) == (acceptance, overlap)]
            axes.plot(
                [row["num_targets"] for row in line],
                [row["tokens_per_second"] for row in line],
                "o-" if overlap else "s--",
                color=colour,
                label=f"acceptance {acceptance}{', overlapped' if overlap else ''}",
            )
    counts = range(1, num_gpus + 1)
    axes.set_xticks(counts, [f"{count}:{num_gpus - count}" for count in counts])
    axes.set(
        xlabel=f"targets : drafters, {num_gpus} GPUs, {num_users} users",
        ylabel="tokens a second in all",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(FOLDER / "plan.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--users", type=int, default=32)
    options = parser.parse_args()
    devices, passes = check_passes()
    device = devices["bfloat16"]
    outcomes = simulate_ratios(options.gpus, options.users)
    results = {
        "device": asdict(device),
        "float32": asdict(devices["float32"]),
        "passes": passes,
        "prefill": check_prefill(device),
        "decoding": check_decoding(device),
        "ratios": {"gpus": options.gpus, "users": options.users, "rows": outcomes},
    }
    overlap = read("overlap")
    if "hit_rate" in overlap:
        results["overlap"] = check_overlap(overlap)
    for name in ("passes", "prefill", "decoding", "overlap"):
        print(name, {key: value for key, value in results.get(name, {}).items() if key != "rows"})
    write("plan", results)
    draw(outcomes, options.gpus, options.users)


if __name__ == "__main__":
    main()
