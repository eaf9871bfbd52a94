"""The round model of `rapid plan` against real rounds: costs and tokens at one γ predict those at others."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import rapid  # noqa: F401 (before torch)

# isort: split
from benchmarks.common.local import MODEL, config
from benchmarks.common.questions import Question, questions
from benchmarks.common.results import write
from benchmarks.plan import summary
from cluster.capacity.planner import Round, per_token_acceptance
from deployments.builders import local_backend
from rapid.events import Delta
from rapid.generate import generate
from rapid.request import GenerationRequest
from rapid.sampling.params import SamplingParams
from rapid.speculation.controller import MAX_DRAFT_TOKENS
from rapid.speculation.params import SpeculationParams
from rapid.text.tokenizer import load_tokenizer

GAMMAS = (0, 2, 4)
Gamma = int | Literal["auto"]
UNCOUNTED = 2  # rounds at the start: the first one waits for the drafter


async def measure_rounds(asked: Sequence[Question], num_rounds: int) -> list[dict[str, Any]]:
    """Real rounds, greedy, at every γ of GAMMAS and with chosen γ. The runs take turns, round by round.

    This machine's speed changes within seconds, so runs one after another would have different speeds.
    """
    settings, rows = config(), []
    options = replace(settings.retriever.options, threshold=-1.0)  # always retrieve: the drafter needs passages
    with local_backend(settings) as backend:
        for question in asked:
            gammas: tuple[Gamma, ...] = (*GAMMAS, "auto")
            requests = {gamma: _request(question, gamma, num_rounds, options) for gamma in gammas}
            streams = {gamma: generate(request, backend) for gamma, request in requests.items()}
            seen: dict[Gamma, list[tuple[float, int, int]]] = {gamma: [] for gamma in gammas}
            for _ in range(num_rounds):
                for gamma, stream in streams.items():
                    started = time.perf_counter()
                    event = await anext(stream, None)
                    if isinstance(event, Delta):  # and not the end
                        seen[gamma].append((time.perf_counter() - started, event.num_drafted, event.num_accepted))
            for gamma, stream in streams.items():
                await stream.aclose()
                rows.append(_row(question.question, gamma, seen[gamma][UNCOUNTED:]))
                print(f"  {rows[-1]}", flush=True)
    return rows


def _request(question: Question, gamma: Gamma, num_rounds: int, options: Any) -> GenerationRequest:
    strategy = "speculative" if gamma else "autoregressive"
    return GenerationRequest(
        prompt=question.prompt,
        sampling=SamplingParams(temperature=0),
        speculation=SpeculationParams(strategy=strategy, num_draft_tokens=gamma),
        retrieval=options,
        max_tokens=((MAX_DRAFT_TOKENS if gamma == "auto" else gamma) + 1) * (num_rounds + 1),
    )


def _row(question: str, gamma: Gamma, seen: Sequence[tuple[float, int, int]]) -> dict[str, Any]:
    seconds, drafted, accepted = (sum(column) for column in zip(*seen, strict=True))
    return {
        "question": question,
        "gamma": gamma,
        "rounds": len(seen),
        "drafted": drafted,
        "accepted": accepted,
        "round_ms": round(seconds / len(seen) * 1e3, 2),
        "tokens_per_second": round((len(seen) + accepted) / seconds, 2),
    }


def check_rounds(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Predicts the speed at each γ from the same question's rounds at the other γ, and from its plain rounds.

    ``cost_and_acceptance`` uses nothing of the predicted run; ``cost`` uses its own acceptance. For ``chosen`` the
    controller chooses γ each round; the run's own numbers of drafted and accepted tokens are used, and a draft token
    costs the mean of the others.
    """
    errors: dict[str, list[float]] = {"cost_and_acceptance": [], "cost": [], "chosen": []}
    predictions = []
    by_run = {(row["question"], row["gamma"]): row for row in rows}
    for (question, gamma), row in by_run.items():
        if gamma == 0:
            continue
        plain_ms = by_run[question, 0]["round_ms"]
        others = [by_run[question, g] for g in GAMMAS if g not in (0, gamma)]
        # The cost of one draft token, with its share of the verification.
        draft_ms = statistics.mean((other["round_ms"] - plain_ms) / other["gamma"] for other in others)
        predicted: dict[str, float] = {}
        if gamma == "auto":
            took_ms = row["rounds"] * plain_ms + row["drafted"] * draft_ms
            predicted["chosen"] = (row["rounds"] + row["accepted"]) / took_ms * 1e3
        else:
            for name, seen in (("cost_and_acceptance", others[0]), ("cost", row)):
                acceptance = per_token_acceptance(seen["accepted"] / seen["drafted"], seen["gamma"])
                modelled = Round(gamma, acceptance, draft_ms / 1e3, plain_ms / 1e3, call_s=0.0)
                predicted[name] = modelled.tokens_per_second
        for name, speed in predicted.items():
            errors[name].append(speed / row["tokens_per_second"] - 1)
        measured = {key: row[key] for key in ("question", "gamma", "tokens_per_second")}
        predictions.append(measured | {name: round(speed, 2) for name, speed in predicted.items()})
    return {name: summary(values) for name, values in errors.items()} | {"predictions": predictions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    asked = list(questions(load_tokenizer(MODEL), options.prompt_tokens))[: options.questions]
    rows = asyncio.run(measure_rounds(asked, options.rounds))
    checked = check_rounds(rows)
    print(*checked["predictions"], sep="\n")
    print({name: value for name, value in checked.items() if name != "predictions"})
    write("rounds", {"rows": rows, **checked})


if __name__ == "__main__":
    main()
