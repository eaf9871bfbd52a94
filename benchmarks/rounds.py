"""The round model of `rapid plan` against real rounds: what they cost and bring at one γ predicts another γ."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import rapid  # noqa: F401 (before torch)

# isort: split
from benchmarks.local import MODEL, config
from benchmarks.plan import summary
from benchmarks.questions import Question, questions
from benchmarks.results import write
from cluster.plan import Round, per_token_acceptance
from deployments.assembly import local_backend
from rapid.generate import generate
from rapid.request import Delta, GenerationRequest, SpeculationParams
from rapid.sampling import SamplingParams
from rapid.tokenization import load_tokenizer

GAMMAS = (0, 2, 4)
UNCOUNTED = 2  # rounds at the start: the first one waits for the drafter


async def measure_rounds(asked: Sequence[Question], num_rounds: int) -> list[dict[str, Any]]:
    """Real rounds at every γ of GAMMAS, greedy. The γs of a question take turns, round by round.

    This machine's speed changes within seconds, so runs one after another would be at different speeds.
    """
    settings, rows = config(), []
    options = replace(settings.retriever.options, threshold=-1.0)  # whatever is retrieved: there has to be a drafter
    with local_backend(settings) as backend:
        for question in asked:
            requests = {gamma: _request(question, gamma, num_rounds, options) for gamma in GAMMAS}
            streams = {gamma: generate(request, backend) for gamma, request in requests.items()}
            seen: dict[int, list[tuple[float, int, int]]] = {gamma: [] for gamma in GAMMAS}
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


def _request(question: Question, gamma: int, num_rounds: int, options: Any) -> GenerationRequest:
    strategy = "speculative" if gamma else "autoregressive"
    return GenerationRequest(
        prompt=question.prompt,
        sampling=SamplingParams(temperature=0),
        speculation=SpeculationParams(strategy=strategy, num_draft_tokens=gamma),
        retrieval=options,
        max_tokens=(gamma + 1) * (num_rounds + 1),
    )


def _row(question: str, gamma: int, seen: Sequence[tuple[float, int, int]]) -> dict[str, Any]:
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
    """Predicts the speed at each γ from the same question's rounds at the other, and from its plain rounds.

    ``cost_and_acceptance``: nothing of the predicted run is used. ``cost``: its own acceptance is.
    """
    errors: dict[str, list[float]] = {"cost_and_acceptance": [], "cost": []}
    predictions = []
    by_run = {(row["question"], row["gamma"]): row for row in rows}
    for (question, gamma), row in by_run.items():
        if gamma == 0:
            continue
        plain = by_run[question, 0]
        other = next(by_run[question, g] for g in GAMMAS if g not in (0, gamma))
        draft_ms = (other["round_ms"] - plain["round_ms"]) / other["gamma"]  # with what it adds to the verification
        measured = {key: row[key] for key in ("question", "gamma", "tokens_per_second")}
        for name, seen in (("cost_and_acceptance", other), ("cost", row)):
            acceptance = per_token_acceptance(seen["accepted"] / seen["drafted"], seen["gamma"])
            modelled = Round(gamma, acceptance, draft_ms / 1e3, plain["round_ms"] / 1e3, call_s=0.0)
            measured[name] = round(modelled.tokens_per_second, 2)
            errors[name].append(measured[name] / row["tokens_per_second"] - 1)
        predictions.append(measured)
    return {name: summary(values) for name, values in errors.items()} | {"predictions": predictions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=16)
    options = parser.parse_args()
    asked = list(questions(load_tokenizer(MODEL), options.prompt_tokens))[: options.questions]
    rows = asyncio.run(measure_rounds(asked, options.rounds))
    checked = check_rounds(rows)
    print(*checked["predictions"], sep="\n")
    print({name: value for name, value in checked.items() if name != "predictions"})
    write("rounds", {"rows": rows, **checked})


if __name__ == "__main__":
    main()
