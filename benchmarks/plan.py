"""`rapid plan`'s arithmetic held against what was measured here: single passes, whole prefills, and decoding.

Five constants of this machine are fitted to the passes of steps.json at every other context, and predict the rest. The
picture is the simulation's: tokens a second over the ratio of targets to drafters. `python -m benchmarks.rounds` tests
the round model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import rapid  # noqa: F401 (before torch)

# isort: split
from benchmarks.local import config
from benchmarks.results import FOLDER, write
from cluster.devices import GPUS, Device
from cluster.plan import Planner, Workload
from cluster.shapes import SHAPES, ServedModel
from cluster.simulation import Setup, every_ratio

SMOL, LLAMA = SHAPES["smollm2-135m"], SHAPES["llama-3.1-8b"]
SERVED = {
    "float32": ServedModel(SMOL, 4.0, 4),
    "bfloat16": ServedModel(SMOL),
    "int8": ServedModel(SMOL, 1.0),
    "int4": ServedModel(SMOL, 0.625),
}
PASSES = {"plain step": 1, "verify 5": 5, "verify 11": 11}
FITTED = ("flops", "weights", "cache", "attention", "layer_s")  # `products` stays 1: flops is what products reach
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


def read(name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return results


def fit(device: Device, passes: Sequence[Pass]) -> Device:
    """The constants with the least mean squared logarithm of predicted ÷ measured, each moved in turn."""

    def loss(candidate: Device) -> float:
        return statistics.mean(math.log1p(one.error(candidate)) ** 2 for one in passes)

    step = 2.0
    while step > 1.001:
        tried = [
            replace(device, **{name: getattr(device, name) * factor}) for name in FITTED for factor in (step, 1 / step)
        ]
        better = min(tried, key=loss)
        if loss(better) < loss(device):
            device = better
        else:
            step = math.sqrt(step)
    return device


def summary(errors: Sequence[float]) -> dict[str, float]:
    """Of predicted ÷ measured - 1, without the sign."""
    sizes = [abs(error) for error in errors]
    return {
        "predictions": len(sizes),
        "median_error": round(statistics.median(sizes), 4),
        "worst_error": round(max(sizes), 4),
    }


def check_passes() -> tuple[Device, dict[str, Any]]:
    """This machine as a device, and how well it predicts the contexts it was not fitted to."""
    steps = read("steps")
    passes = [
        Pass(row["weights"], row["context"], tokens, row[name] / 1e3)
        for row in steps["rows"]
        for name, tokens in PASSES.items()
        if name in row
    ]
    memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    guess = Device(memory, steps["bandwidth_gb_per_s"] * 1e9, 1e11, weights=0.5, cache=0.2, products=1.0, attention=0.5)
    fitted_to = [one for one in passes if one.context not in HELD_OUT]
    held_out = [one for one in passes if one.context in HELD_OUT]
    device = fit(replace(guess, layer_s=5e-4), fitted_to)
    results = {
        "fitted_to": summary([one.error(device) for one in fitted_to]),
        "held_out": summary([one.error(device) for one in held_out]),
        "rows": [asdict(one) | {"error": round(one.error(device), 4)} for one in held_out],
    }
    for kind, tokens in PASSES.items():
        results[f"held_out {kind}"] = summary([one.error(device) for one in held_out if one.tokens == tokens])
    return device, results


def check_prefill(device: Device) -> dict[str, Any]:
    """Whole prefills, of which none was fitted to; retrieval and the drafter's prefill ran beside the measured ones."""
    rows = read("serving")["shared_prefix"]["rows"]
    tokens, chunk = 6948, config().target.max_batch_tokens
    predicted = tokens / device.prefill_s(SERVED["bfloat16"], tokens, chunk)
    measured = [row["prefill_tokens_per_second"] for row in rows]
    return {
        "predicted_tokens_per_second": round(predicted, 1),
        "measured_tokens_per_second": measured,
        **summary([predicted / one - 1 for one in measured]),
    }


def check_decoding() -> dict[str, Any]:
    """The chosen γ of decode.json: its rounds and drafts, at what plain decoding cost there and steps.json's ratios."""
    rows = {(row["weights"], row["context"]): row for row in read("steps")["rows"]}
    target = rows["bfloat16", 7000]
    draft = rows["int4", 1024]["plain step"] / target["plain step"]
    extra = (target["verify 5"] / target["plain step"] - 1) / 4  # of one more token to verify
    errors: dict[str, list[float]] = {"lookup": [], "rapid": []}
    for row in read("decode")["rows"]:
        for strategy, found in errors.items():
            seen = row[strategy]
            by_model = seen["drafted"] - seen["lookup_drafted"]
            plain_steps = seen["rounds"] + extra * seen["drafted"] + draft * by_model
            predicted = seen["emitted"] / plain_steps * row["autoregressive"]["tokens_per_second"]
            found.append(predicted / seen["tokens_per_second"] - 1)
    return {strategy: summary(found) for strategy, found in errors.items()}


def simulate_ratios(num_gpus: int, num_users: int) -> list[dict[str, Any]]:
    """Llama-3.1-8B at 122K on H200s, drafted for by its int4 copy: every R:S, with overlap and without."""
    outcomes = []
    for acceptance in (0.6, 0.8, 0.9):
        planner = Planner(
            GPUS["h200"], ServedModel(LLAMA), ServedModel(LLAMA, 0.625), Workload(122_000, 5_120, 8, acceptance)
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
    device, passes = check_passes()
    outcomes = simulate_ratios(options.gpus, options.users)
    results = {
        "device": asdict(device),
        "passes": passes,
        "prefill": check_prefill(device),
        "decoding": check_decoding(),
        "ratios": {"gpus": options.gpus, "users": options.users, "rows": outcomes},
    }
    for name in ("passes", "prefill", "decoding"):
        print(name, {key: value for key, value in results[name].items() if key != "rows"})
    write("plan", results)
    draw(outcomes, options.gpus, options.users)


if __name__ == "__main__":
    main()
