"""Answers with transfer: the target alone, the passages alone, fixed η, and η as a trust region.

Each context is made of passages of Natural Questions, one of which answers the question: at a chosen depth, or left
out. η "auto" transfers at every position (`transfer_temperature` 1); a fixed η does so at temperature 0, and is the
paper's transfer above it.

An answer is right if it contains one of the expected ones, both in lower case and without articles and punctuation.
Differences to the target alone, and to the passages alone, are paired by question, with a 95% bootstrap interval.

Each answer is appended to a file at once, and an answer that is there is not computed again. So a run may be ended at
any time and continued by the same command, also on another machine: all answers are kept beside the results, each with
the commit that wrote it.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import re
import string
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import rapid  # noqa: F401 (before torch)

# isort: split
import numpy as np
from transformers import PreTrainedTokenizerBase

from benchmarks.common.local import MODEL, config
from benchmarks.common.results import DATA, FOLDER, commit, write
from deployments.builders import local_backend
from deployments.config import AppConfig
from rapid.backend.local import LocalBackend
from rapid.events import Finish
from rapid.generate import generate
from rapid.request import GenerationRequest
from rapid.sampling.params import SamplingParams
from rapid.speculation.params import SpeculationParams
from rapid.text.prompts import Message, Prompt, read_chat
from rapid.text.tokenizer import load_tokenizer

ABSENT = "absent"
NEW_TOKENS = 24
KEPT = FOLDER / "transfer_answers.jsonl.gz"
ARMS: dict[str, dict[str, Any]] = {
    "target alone": {"strategy": "autoregressive"},
    "passages alone": {"strategy": "rag"},
    **{f"η = {eta}": {"transfer_strength": float(eta)} for eta in (2, 5, 10, 20)},
    "η auto": {"transfer_strength": "auto"},
}
TRANSFERRING = {"verification": "augmented", "num_draft_tokens": 4}
ASK = "Answer in a few words, from the text above: "


class Case(NamedTuple):
    """A question in a context of ``length`` tokens, with the gold passage at ``gold`` (a share, or "absent")."""

    number: int
    length: int
    gold: str
    answers: list[str]
    prompt: Prompt


def cases(tokenizer: PreTrainedTokenizerBase, length: int, golds: list[str], num_questions: int) -> Iterator[Case]:
    with gzip.open(DATA / "nq_open_oracle.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    passages = [f"{row['ctxs'][0]['title']}: {row['ctxs'][0]['text']}" for row in rows]
    sizes = [len(tokenizer(passage, add_special_tokens=False).input_ids) for passage in passages]
    order = np.random.default_rng(1)
    for number in range(num_questions):
        row = rows[number]
        others, room = [], length - sizes[number]
        for i in order.permutation(len(rows)).tolist():
            if i != number and not is_right(passages[i], row["answers"]):
                others.append(passages[i])
                room -= sizes[i]
            if room <= 0:
                break
        for gold in golds:
            context = list(others)
            if gold != ABSENT:
                context.insert(round(float(gold) * len(others)), passages[number])
            content = "\n\n".join(context) + f"\n\n{ASK}{row['question']}?"
            yield Case(number, length, gold, row["answers"], read_chat([Message("user", content)], tokenizer))


def plain(text: str) -> str:
    text = "".join(" " if char in string.punctuation else char for char in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def is_right(text: str, answers: list[str]) -> bool:
    return any(f" {plain(answer)} " in f" {plain(text)} " for answer in answers)


async def answer(
    backend: LocalBackend, settings: AppConfig, case: Case, arm: str, temperature: float, most_nats: float
) -> dict[str, Any]:
    options = ARMS[arm]
    if "strategy" not in options:
        # A given η above temperature 0 is the paper's own transfer.
        everywhere = temperature == 0 or options["transfer_strength"] == "auto"
        options = options | TRANSFERRING | {"transfer_divergence": most_nats, "transfer_temperature": float(everywhere)}
    request = GenerationRequest(
        prompt=case.prompt,
        sampling=SamplingParams(temperature=temperature, seed=case.number),
        speculation=SpeculationParams(**options),
        retrieval=settings.retriever.options,
        max_tokens=NEW_TOKENS,
    )
    text = ""
    async for event in generate(request, backend):
        text += event.text
        if isinstance(event, Finish):
            statistics = event.statistics
    return {
        "text": text.strip(),
        "right": is_right(text, case.answers),
        "fallback": statistics.fallback,
        "acceptance_rate": statistics.acceptance_rate,
        "transfer": statistics.transfer.__dict__,
    }


async def answers(
    backend: LocalBackend, settings: AppConfig, case: Case, asked: list[tuple[float, str]], most_nats: float
) -> list[dict[str, Any]]:
    """Of each temperature and arm. The first one reads the prompt; the others find it read, and run together."""

    async def its_answer(temperature: float, arm: str) -> dict[str, Any]:
        return await answer(backend, settings, case, arm, temperature, most_nats)

    first, *others = asked
    return [await its_answer(*first), *await asyncio.gather(*(its_answer(*other) for other in others))]


def interval(gains: list[int]) -> tuple[float, float]:
    """95% of the means of samples drawn with replacement."""
    draws = np.random.default_rng(2).choice(np.array(gains), (10_000, len(gains))).mean(-1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return round(float(low), 4), round(float(high), 4)


def summary(found: dict[tuple[Any, ...], dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each setting and arm, over the questions that all arms have answered."""
    settings: defaultdict[tuple[Any, ...], defaultdict[int, dict[str, dict[str, Any]]]]
    settings = defaultdict(lambda: defaultdict(dict))
    for (length, gold, temperature, number, arm), row in found.items():
        settings[length, gold, temperature][number][arm] = row
    rows = []
    for (length, gold, temperature), questions in sorted(settings.items(), key=str):
        complete = [arms for arms in questions.values() if len(arms) == len(ARMS)]
        for arm in ARMS if complete else ():
            right = [int(arms[arm]["right"]) for arms in complete]
            to_target, to_passages = (
                [its - int(arms[alone]["right"]) for its, arms in zip(right, complete, strict=True)]
                for alone in ("target alone", "passages alone")
            )
            chosen = [arms[arm]["transfer"] for arms in complete if arms[arm]["transfer"]["positions"]]
            rows.append(
                {
                    "context_tokens": length,
                    "gold": gold,
                    "temperature": temperature,
                    "arm": arm,
                    "questions": len(right),
                    "right": round(sum(right) / len(right), 4),
                    "gain": round(sum(to_target) / len(right), 4),
                    "gain_95": interval(to_target),
                    "gain_to_passages": round(sum(to_passages) / len(right), 4),
                    "gain_to_passages_95": interval(to_passages),
                    "mean_strength": round(float(np.mean([t["strength"] for t in chosen])), 3) if chosen else None,
                    "mean_nats": round(float(np.mean([t["divergence"] for t in chosen])), 4) if chosen else None,
                    "mean_confidence": round(float(np.mean([t["confidence"] for t in chosen])), 3) if chosen else None,
                }
            )
    return rows


def read_answers(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    data = path.read_bytes() if path.exists() else b""
    text = (gzip.decompress(data) if data and path.suffix == ".gz" else data).decode()
    return {tuple(row["key"]): row for row in map(json.loads, text.splitlines())}


def keep_answers(found: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) for _, row in sorted(found.items(), key=str))
    KEPT.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 6144])
    parser.add_argument("--golds", nargs="+", default=["0.1", "0.5", "0.9", ABSENT])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.3])
    parser.add_argument("--most-nats", type=float, default=SpeculationParams().transfer_divergence)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after about this long")
    parser.add_argument("--answers", type=Path, default=Path("build/transfer_answers.jsonl"))
    options = parser.parse_args()
    found = read_answers(KEPT) | read_answers(options.answers)
    ends = time.monotonic() + 60 * options.minutes
    options.answers.parent.mkdir(parents=True, exist_ok=True)
    settings = config(max_sequences=len(ARMS) * len(options.temperatures))
    tokenizer = load_tokenizer(MODEL)
    todo = [
        (case, missing)
        for length in options.lengths
        for case in cases(tokenizer, length, options.golds, options.questions)
        if (
            missing := [
                (temperature, arm)
                for temperature in options.temperatures
                for arm in ARMS
                if (length, case.gold, temperature, case.number, arm) not in found
            ]
        )
    ]
    with local_backend(settings) as backend, options.answers.open("a", encoding="utf-8") as file:
        for done, (case, missing) in enumerate(todo):
            if time.monotonic() > ends:
                break
            rows = asyncio.run(answers(backend, settings, case, missing, options.most_nats))
            for (temperature, arm), row in zip(missing, rows, strict=True):
                key = case.length, case.gold, temperature, case.number, arm
                found[key] = {"key": key, "commit": commit()} | row
                file.write(json.dumps(found[key], ensure_ascii=False) + "\n")
            file.flush()
            if sys.stderr.isatty() or done % len(ARMS) == 0:
                print(f"{done + 1} of {len(todo)} contexts", file=sys.stderr, flush=True)
    keep_answers(found)
    table = summary(found)
    for row in table:
        gains = (
            f"{row[to]:+6.1%} ({row[f'{to}_95'][0]:+.1%} to {row[f'{to}_95'][1]:+.1%})"
            for to in ("gain", "gain_to_passages")
        )
        print(
            f"{row['context_tokens']:6} gold {row['gold']:6} T {row['temperature']:3} {row['arm']:15} "
            f"{row['right']:6.1%} of {row['questions']:4}  {'  '.join(gains)}"
        )
    write("transfer", {"most_nats": options.most_nats, "new_tokens": NEW_TOKENS, "rows": table})


if __name__ == "__main__":
    main()
