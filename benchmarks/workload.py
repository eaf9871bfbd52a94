"""Decode speed by kind of work, against plain decoding: what drafting gains on what people ask of documents.

Each question is prefilled once. Then plain decoding and the strategies decode it in turns, as often as ``--repeats``
says, and a question's ratio is that of their median speeds. With ``--at-once`` several questions are decoded together;
the ratio of all is that of their summed speeds. Texts are sampled without a seed, so each run writes its
own. Beside the ratios stands the share of 8-grams that repeat earlier ones: a text that goes round in circles is easy
to look up.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import rapid  # noqa: F401 (before torch)

# isort: split
from benchmarks.common.local import MODEL, Run, config, timed, with_window
from benchmarks.common.results import write
from benchmarks.common.work import Document, Kind, kinds, prompts, repeated, settings_of
from deployments.builders import local_backend
from deployments.config import AppConfig
from rapid.backend.local import LocalBackend
from rapid.request import GenerationRequest
from rapid.speculation.params import SpeculationParams
from rapid.text.prompts import Prompt
from rapid.text.tokenizer import load_tokenizer

T = TypeVar("T")
PLAIN, STRATEGIES = "autoregressive", ("rapid", "speculative", "lookup")


def request_of(
    kind: Kind, prompt: Prompt, settings: AppConfig, new_tokens: int, *, to_the_end: bool = False, **how: Any
) -> GenerationRequest:
    """``to_the_end``: the answer has ``new_tokens``, so that others beside it always have the same company."""
    return GenerationRequest(
        prompt=prompt,
        sampling=kind.sampling,
        speculation=SpeculationParams(**how),
        retrieval=settings.retriever.options,
        max_tokens=new_tokens,
        logits=kind.logits,
        ignore_eos=to_the_end,
    )


async def measure(
    backend: LocalBackend, settings: AppConfig, kind: Kind, asked: list[Prompt], options: argparse.Namespace
) -> list[dict[str, list[Run]]]:
    """The runs of each question by strategy, all questions at once."""
    for prompt in asked:
        for how in (
            {"strategy": PLAIN},
            {"strategy": "rapid", "num_draft_tokens": 1},
        ):  # both models read their prompts
            await timed(backend, request_of(kind, prompt, settings, 2, **how))
    runs: list[dict[str, list[Run]]] = [{name: [] for name in (PLAIN, *options.strategies)} for _ in asked]
    for repeat in range(options.repeats):
        for strategy in list(runs[0])[:: -1 if repeat % 2 else 1]:
            requests = [
                request_of(
                    kind, prompt, settings, options.new_tokens, to_the_end=options.at_once > 1, strategy=strategy
                )
                for prompt in asked
            ]
            together = await asyncio.gather(*(timed(backend, request) for request in requests))
            for own, run in zip(runs, together, strict=True):
                own[strategy].append(run)
    return runs


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """``items`` in lists of ``size``; the last may be shorter."""
    remaining = iter(items)
    while batch := list(itertools.islice(remaining, size)):
        yield batch


def row_of(document: Document, question: str, prompt: Prompt, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """One question's figures."""
    speeds = {name: statistics.median(run.tokens_per_second for run in those) for name, those in runs.items()}
    row: dict[str, Any] = {
        "document": document.name,
        "tuned": document.is_tuned,
        "question": question[-120:],
        "prompt_tokens": len(prompt.tokens),
    }
    for name, those in runs.items():
        row[name] = {
            "tokens_per_second": round(speeds[name], 2),
            "ratio": round(speeds[name] / speeds[PLAIN], 3),
            **_counts(those),
            "repeated": round(statistics.mean(repeated(run.tokens) for run in those), 3),
            "from_the_prompt": round(statistics.mean(repeated(run.tokens, prompt.tokens) for run in those), 3),
        }
    return row


def _counts(runs: list[Run]) -> dict[str, Any]:
    """What the rounds of ``runs`` drafted, and what they cost: milliseconds of a draft token and of a verification."""
    every = [run.statistics for run in runs]
    names = ("emitted", "rounds", "drafted", "accepted", "lookup_drafted", "lookup_accepted")
    counts = {name: sum(getattr(each, name) for each in every) for name in names}
    times = {name: sum(each.timings_ms[name] for each in every) for name in ("drafting", "verification", "transport")}
    sampled = counts["drafted"] - counts["lookup_drafted"]
    return counts | {
        "draft_token_ms": round(times["drafting"] / sampled, 2) if sampled else None,
        "verification_ms": round(times["verification"] / max(1, counts["rounds"]), 2),
        "between_ms": round(times["transport"] / max(1, counts["rounds"]), 2),
    }


def summary(kind: Kind, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A line of the table, over all questions of a kind."""
    line: dict[str, Any] = {"kind": kind.name, **settings_of(kind), "questions": len(rows)}
    for name in [name for name in (PLAIN, *STRATEGIES) if name in rows[0]]:
        own = [row[name] for row in rows]
        ratios, total = [each["ratio"] for each in own], {}
        for count in ("rounds", "drafted", "accepted"):
            total[count] = sum(each[count] for each in own)
        line[name] = {
            "ratio": round(statistics.median(ratios), 3),
            "least": min(ratios),
            "most": max(ratios),
            "acceptance": round(total["accepted"] / total["drafted"], 3) if total["drafted"] else None,
            "gamma": round(total["drafted"] / total["rounds"], 2),
            "repeated": round(statistics.mean(each["repeated"] for each in own), 3),
            "from_the_prompt": round(statistics.mean(each["from_the_prompt"] for each in own), 3),
        }
        speeds = [sum(row[which]["tokens_per_second"] for row in rows) for which in (name, PLAIN)]
        line[name]["ratio_of_all"] = round(speeds[0] / speeds[1], 3)
        for half, is_tuned in (("tuned", True), ("not_tuned", False)):
            if part := [row[name]["ratio"] for row in rows if row["tuned"] is is_tuned]:
                line[name][f"ratio_{half}"] = round(statistics.median(part), 3)
    return line


def _print(letter: str, line: dict[str, Any]) -> None:
    shown = "  ".join(
        f"{name} {own['ratio']:.2f} ({own['least']:.2f} to {own['most']:.2f}), "
        f"{own['acceptance'] or 0:.0%} of {own['gamma']:.1f}, repeats {own['repeated']:.0%}"
        for name, own in line.items()
        if isinstance(own, dict) and name != PLAIN
    )
    print(f"({letter}) {line['kind']:22} {shown}", flush=True)


def main() -> None:
    every = kinds()
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="; ".join(f"{letter}: {kind.name}" for letter, kind in every.items()),
    )
    parser.add_argument("--kinds", default="".join(every), help="letters")
    parser.add_argument("--prompt-tokens", type=int, default=7000)
    parser.add_argument("--questions", type=int, default=12, help="of each kind; six documents take turns")
    parser.add_argument("--at-once", type=int, default=1, help="questions that are decoded together")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--part", help="writes workload_PART.json; else the prompt's tokens, if they are not 7000")
    options = parser.parse_args()
    tokenizer = load_tokenizer(MODEL)
    table: dict[str, Any] = {}
    with with_window(options.prompt_tokens + options.new_tokens + 512) as target:
        settings = config(target=target)
        with local_backend(settings) as backend:
            for letter in options.kinds:
                kind, rows = every[letter], []
                asked = prompts(kind, tokenizer, options.prompt_tokens, options.questions)
                for group in batched(asked, options.at_once):
                    runs = asyncio.run(measure(backend, settings, kind, [prompt for *_, prompt in group], options))
                    for (document, question, prompt), own in zip(group, runs, strict=True):
                        rows.append(row_of(document, question, prompt, own))
                        ratios = "  ".join(f"{name} {rows[-1][name]['ratio']:.2f}" for name in options.strategies)
                        plain = rows[-1][PLAIN]["tokens_per_second"]
                        print(f"  {document.name[:24]:24} plain {plain:5.1f}/s  {ratios}", flush=True)
                table[letter] = summary(kind, rows) | {"rows": rows}
                _print(letter, table[letter])
    together = f"{options.at_once}_at_once" if options.at_once > 1 else ""
    part = options.part or together or ("" if options.prompt_tokens == 7000 else str(options.prompt_tokens))
    chosen = {name: getattr(options, name) for name in ("prompt_tokens", "at_once", "new_tokens", "repeats")}
    write("workload", chosen | {"kinds": table}, part=part)


if __name__ == "__main__":
    main()
