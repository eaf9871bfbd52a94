"""Drafting ahead while the target verifies, on and off: the same questions, in turns, to the same engines.

Target and drafter have one thread each, so that each has its own of two cores. Decoding is greedy with a fixed γ: the
rounds differ only in the time when drafts are made. The decode loop runs in this process over the deployed engines.
With ``--http`` two applications, one of each kind, answer over HTTP instead; HTTP and its processes then use the same
two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any

import ray
from ray import serve

from benchmarks.common.local import MODEL, run
from benchmarks.common.questions import Question, questions
from benchmarks.common.results import write
from deployments.app import build
from deployments.config import AppConfig, parse_config
from deployments.serve.backend import RayBackend
from rapid.text.tokenizer import load_tokenizer

PORT = 8124
SIDES = ("on", "off")
COUNTED = ("rounds", "drafted", "accepted", "drafted_ahead", "emitted")
TIMED = {"drafting": "draft_ms", "verification": "verify_ms", "transport": "transport_ms"}

Ask = Callable[[str, Question, int], Awaitable[tuple[float, dict[str, Any]]]]
"""(side, question, tokens to write) to (tokens per second after the first, counts of the answer's `rapid` object)."""


def config(*, overlap: bool) -> AppConfig:
    engine = {"model": MODEL, "threads": 1, "kv_memory_gib": 1.0}
    return parse_config(
        {
            "target": engine,
            "drafter": engine | {"quantization": "int4"},
            "overlap": overlap,
            "retriever": {"options": {"chunk_tokens": 256, "threshold": -1.0}},
        }
    )


async def ask_engines(how: dict[str, Any]) -> Ask:
    """One application; its engines do not know whether the decode loop drafts ahead."""
    serve.run(build(config(overlap=True)), name="app")
    target, drafter, retriever = (serve.get_deployment_handle(n, "app") for n in ("Target", "Drafter", "Retriever"))
    backends = {
        side: RayBackend({"target": target, "drafter": drafter}, retriever, overlap=side == "on") for side in SIDES
    }
    for backend in backends.values():
        await backend.connect()

    async def ask(side: str, question: Question, new_tokens: int) -> tuple[float, dict[str, Any]]:
        ran = await run(backends[side], config(overlap=True), question.prompt, 0.0, new_tokens, **how)
        return ran.tokens_per_second, vars(ran.statistics)

    return ask


def ask_over_http(how: dict[str, Any]) -> Ask:
    for side in SIDES:
        serve.run(build(config(overlap=side == "on")), name=side, route_prefix=f"/{side}")

    def streamed(side: str, question: Question, new_tokens: int) -> tuple[float, dict[str, Any]]:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "\n\n".join([*question.prompt.contents, question.question])}],
            "max_tokens": new_tokens,
            "temperature": 0,
            "stream": True,
            "rapid": how,
        }
        url = f"http://127.0.0.1:{PORT}/{side}/v1/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        first, last, found = 0.0, 0.0, {}
        with urllib.request.urlopen(request, timeout=600) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    data = json.loads(line[6:])
                    if any(choice["delta"].get("content") for choice in data["choices"]):
                        first, last = first or time.perf_counter(), time.perf_counter()
                    found = data.get("rapid", found)
        return (found["emitted"] - 1) / (last - first), found

    async def ask(side: str, question: Question, new_tokens: int) -> tuple[float, dict[str, Any]]:
        return await asyncio.to_thread(streamed, side, question, new_tokens)

    return ask


async def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each answer; the two rows of a pair are neighbours."""
    how = {"strategy": "speculative", "num_draft_tokens": options.draft_tokens}
    ask = ask_over_http(how) if options.http else await ask_engines(how)
    rows: list[dict[str, Any]] = []
    for question in questions(load_tokenizer(MODEL), options.prompt_tokens):
        if options.document not in (None, question.document):
            continue
        for side in SIDES:  # prefills the prompt
            await ask(side, question, 8)
        for _ in range(options.repeats):
            for side in SIDES:
                speed, found = await ask(side, question, options.new_tokens)
                row: dict[str, Any] = {"document": question.document, "question": question.question, "side": side}
                row |= {"tokens_per_second": round(speed, 2)} | {name: found[name] for name in COUNTED}
                per_round = {name: found["timings_ms"][part] / found["rounds"] for part, name in TIMED.items()}
                rows.append(row | {name: round(ms, 2) for name, ms in per_round.items()})
            on, off = rows[-2:]
            speeds = f"on {on['tokens_per_second']:5.1f} off {off['tokens_per_second']:5.1f}"
            print(f"  {question.document:20} {speeds} {on['drafted_ahead']} of {on['drafted']} ahead", flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens per second, the ratio of neighbouring answers, and the mean times of a round on each side."""
    on, off = ([row for row in rows if row["side"] == side] for side in SIDES)
    ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(on, off, strict=True)]
    summed: dict[str, Any] = {
        "median_ratio": round(statistics.median(ratios), 3),
        "mean_ratio": round(statistics.mean(ratios), 3),
        "worst_ratio": round(min(ratios), 3),
        "hit_rate": round(sum(row["drafted_ahead"] for row in on) / sum(row["drafted"] for row in on), 3),
    }
    for side, answers in zip(SIDES, (on, off), strict=True):
        speed = statistics.median(row["tokens_per_second"] for row in answers)
        parts = {f"mean_{name}": round(statistics.mean(a[name] for a in answers), 2) for name in TIMED.values()}
        summed[side] = {"median_tokens_per_second": round(speed, 2)} | parts
    return summed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=6900)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--draft-tokens", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--document", help="only the questions about this one")
    parser.add_argument("--http", action="store_true", help="over HTTP, and what it costs with it")
    options = parser.parse_args()
    ray.init(include_dashboard=False, num_cpus=8, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        rows = asyncio.run(measure(options))
    finally:
        serve.shutdown()
        ray.shutdown()
    summed = {"draft_tokens": options.draft_tokens, "new_tokens": options.new_tokens} | summary(rows)
    print(summed)
    write("overlap", summed | {"rows": rows}, part="http" if options.http else "")


if __name__ == "__main__":
    main()
