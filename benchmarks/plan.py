"""`rapid plan`'s arithmetic held against what was measured here: passes, prefill, and rounds of real runs.

Five constants of this machine are fitted to the passes of steps.json at every other context, and predict the rest. Real
runs with a fixed γ then test the round model: what rounds cost in some questions says how fast another is written. The picture is the simulation's: tokens a second over the ratio of targets to drafters.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import rapid  # noqa: F401 (before torch)

# isort: split
from benchmarks.local import MODEL, Run, config, run
from benchmarks.questions import questions
from benchmarks.results import FOLDER, write
from cluster.devices import GPUS, Device
from cluster.plan import Planner, Round, Workload, per_token_acceptance
from cluster.shapes import SHAPES, ServedModel
from cluster.simulation import Setup, every_ratio
from deployments.assembly import local_backend
from rapid.tokenization import load_tokenizer

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
GAMMAS = (2, 4)
COSTS = ("draft_ms", "verify_ms", "call_ms")
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


def _summary(errors: Sequence[float]) -> dict[str, float]:
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
        "fitted_to": _summary([one.error(device) for one in fitted_to]),
        "held_out": _summary([one.error(device) for one in held_out]),
        "rows": [asdict(one) | {"error": round(one.error(device), 4)} for one in held_out],
    }
    for kind, tokens in PASSES.items():
        results[f"held_out {kind}"] = _summary([one.error(device) for one in held_out if one.tokens == tokens])
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
        **_summary([predicted / one - 1 for one in measured]),
    }


async def measure_rounds(num_tokens: int, new_tokens: int) -> list[dict[str, Any]]:
    """Real runs with a fixed γ: for each question plain decoding, then `speculative` at every γ. Greedy."""
    settings, rows = config(), []
    asked = list(questions(load_tokenizer(MODEL), num_tokens))
    with local_backend(settings) as backend:
        for question in asked:
            prompt = question.prompt
            await run(backend, settings, prompt, 0, 8, strategy="speculative", num_draft_tokens=2)  # reads the prompts
            for gamma in (0, *GAMMAS):
                strategy = "speculative" if gamma else "autoregressive"
                timed = await run(
                    backend, settings, prompt, 0, new_tokens, strategy=strategy, num_draft_tokens=gamma or "auto"
                )
                rows.append(_row(question.question, gamma, timed))
                print(f"  {rows[-1]}", flush=True)
    return rows


def _row(question: str, gamma: int, timed: Run) -> dict[str, Any]:
    """Costs in milliseconds: ``draft`` of a drafted token, ``verify`` and ``call`` of a round, which has two calls."""
    counted, ms = timed.statistics, timed.statistics.timings_ms
    calls = 2 if gamma else 1
    return {
        "question": question,
        "gamma": gamma,
        "rounds": counted.rounds,
        "drafted": counted.drafted,
        "accepted": counted.accepted,
        "draft_ms": round(ms["drafting"] / counted.drafted, 3) if counted.drafted else 0.0,
        "verify_ms": round(ms["verification"] / counted.rounds, 3),
        "call_ms": round(ms["transport"] / counted.rounds / calls, 3),
        "tokens_per_second": round(counted.emitted / (ms["drafting"] + ms["verification"] + ms["transport"]) * 1e3, 2),
    }


def check_rounds(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Predicts each question's speed from what rounds cost in the other questions' runs, their median.

    ``own_acceptance``: with the acceptance of that very run. ``other_acceptance``: with the one that the same question
    had at the other γ, so that the tokens of a round are predicted too.
    """
    errors: dict[str, list[float]] = {"plain": [], "own_acceptance": [], "other_acceptance": []}
    predictions = []
    for row in rows:
        others = [r for r in rows if r["question"] != row["question"] and r["gamma"] == row["gamma"]]
        cost = {name: statistics.median(r[name] for r in others) for name in ("gamma", *COSTS)}
        twin = next(r for r in rows if r["question"] == row["question"] and r["gamma"] not in (0, row["gamma"]))
        ways = {"own_acceptance": row, "other_acceptance": twin} if row["gamma"] else {"plain": row}
        predicted = {name: _predict(cost, seen) for name, seen in ways.items()}
        for name, value in predicted.items():
            errors[name].append(value / row["tokens_per_second"] - 1)
        measured = {key: row[key] for key in ("question", "gamma", "tokens_per_second")}
        predictions.append(measured | {name: round(value, 2) for name, value in predicted.items()})
    return {name: _summary(values) for name, values in errors.items()} | {"predictions": predictions}


def _predict(cost: dict[str, float], seen: dict[str, Any]) -> float:
    """Tokens a second of rounds that cost this, where drafts fare as they were ``seen`` to."""
    acceptance = per_token_acceptance(seen["accepted"] / seen["drafted"], seen["gamma"]) if seen["drafted"] else 0.0
    draft_s, verify_s, call_s = (cost[name] / 1e3 for name in COSTS)
    return Round(int(cost["gamma"]), acceptance, draft_s, verify_s, call_s=call_s).tokens_per_second


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
    return {strategy: _summary(found) for strategy, found in errors.items()}


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
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--without-runs", action="store_true", help="arithmetic alone; keeps plan_rounds.json")
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
    if not options.without_runs:
        rows = asyncio.run(measure_rounds(options.prompt_tokens, options.new_tokens))
        rounds = check_rounds(rows)
        print(*rounds["predictions"], sep="\n")
        print({name: value for name, value in rounds.items() if name != "predictions"})
        write("plan", {"rows": rows, **rounds}, part="rounds")


if __name__ == "__main__":
    main()
