"""Drafting while the target verifies, on and off: the same questions, in turns, to two applications on one Ray.

Target and drafter have a thread each, so that on two cores neither has the other's. Only one application works at a
time. Greedy, a fixed γ: the rounds differ in nothing but when the drafts are made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import urllib.request
from typing import Any

import ray
from ray import serve

from benchmarks.questions import questions
from benchmarks.results import write
from deployments.app import build
from deployments.config import parse_config
from rapid.tokenization import load_tokenizer

MODEL = "smollm2-135m-instruct"
PORT = 8124


def application(*, overlap: bool) -> Any:
    engine = {"model": MODEL, "threads": 1, "kv_memory_gib": 1.0}
    return build(
        parse_config(
            {
                "target": engine,
                "drafter": engine | {"quantization": "int4"},
                "overlap": overlap,
                "retriever": {"options": {"chunk_tokens": 256}},
            }
        )
    )


def ask(side: str, text: str, gamma: int, new_tokens: int) -> tuple[float, dict[str, Any]]:
    """(tokens per second after the first, the `rapid` object) of one streamed answer."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": new_tokens,
        "temperature": 0,
        "stream": True,
        "rapid": {"strategy": "speculative", "num_draft_tokens": gamma, "retrieval": {"threshold": -1.0}},
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=6900)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--draft-tokens", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--document", help="only the questions about this one")
    options = parser.parse_args()
    ray.init(include_dashboard=False, num_cpus=8, log_to_driver=False)
    rows: list[dict[str, Any]] = []
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        for side in ("on", "off"):
            serve.run(application(overlap=side == "on"), name=side, route_prefix=f"/{side}")
        # A document's questions share its prefix, so that each side reads it once.
        for question in questions(load_tokenizer(MODEL), options.prompt_tokens):
            if options.document not in (None, question.document):
                continue
            text = "\n\n".join([*question.prompt.contents, question.question])
            for _ in range(options.repeats):
                speed = {}
                for side in ("on", "off"):
                    speed[side], found = ask(side, text, options.draft_tokens, options.new_tokens)
                    row = {name: found[name] for name in ("rounds", "drafted", "accepted", "drafted_ahead", "emitted")}
                    rows.append({"document": question.document, "side": side, "tokens_per_second": speed[side]} | row)
                print(f"  {question.document:20} on {speed['on']:5.1f} off {speed['off']:5.1f} {row}", flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()
    pairs = [(on["tokens_per_second"], off["tokens_per_second"]) for on, off in zip(rows[::2], rows[1::2], strict=True)]
    ratios = [on / off for on, off in pairs]
    results = {
        "draft_tokens": options.draft_tokens,
        "median_on": round(statistics.median(on for on, _ in pairs), 2),
        "median_off": round(statistics.median(off for _, off in pairs), 2),
        "median_ratio": round(statistics.median(ratios), 3),
        "worst_ratio": round(min(ratios), 3),
        "rows": rows,
    }
    print({name: value for name, value in results.items() if name != "rows"})
    write("overlap", results)


if __name__ == "__main__":
    main()
