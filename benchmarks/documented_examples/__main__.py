"""Documented examples of public APIs, sent to a server: each is answered or refused by name, none silently different.

An answer must have the shape that OpenAI's client reads, and what its request asks for: as many choices, vectors or
log-probabilities, no more tokens, calls of tools that are there, text in its form, a stream that ends as it should. A
field that the server does not describe must be named as ignored. Only names are replaced: the model's, and those of a
file and a response. The server is `rapid serve` with the embedded models, unless `--url` names one.
"""

from __future__ import annotations

import rapid  # noqa: F401 (before torch)

# isort: split
import argparse
import time
from contextlib import nullcontext
from typing import Any

import httpx

from benchmarks.common.results import write
from benchmarks.common.served import served
from benchmarks.documented_examples.examples import Example, names_of, read_table, send
from benchmarks.documented_examples.shapes import faults

MOST = 64  # tokens of an answer to a request that names no number
_REQUEST_S = 120


def outcome(client: httpx.Client, example: Example, description: dict[str, Any]) -> dict[str, Any]:
    """What came of an example, and its faults: what is wrong with the answer, or with how it is refused."""
    reply = send(client, example)
    refusal = reply.refusal
    if refusal is not None:
        named = refusal["param"] or refusal["message"]
        is_meant = example.refused is not None and named.startswith(example.refused)
        wrong = [] if is_meant else [f"refused is {named}, not {example.refused}"]
        return {"outcome": "refused", **refusal, "faults": wrong}
    if reply.status != 200:
        return {"outcome": "failed", "status": reply.status, "faults": [str(reply.answer)[:300]]}
    wrong = list(faults(example, reply.answer, description))
    if example.refused:
        wrong.append(f"answered, and {example.refused} should be refused")
    return {"outcome": "answered", "status": 200, "faults": wrong}


def run(url: str) -> list[dict[str, Any]]:
    """A row for each example."""
    rows = []
    with httpx.Client(base_url=url, timeout=_REQUEST_S) as client:
        description = client.get("/openapi.json").raise_for_status().json()
        names = names_of(client)
        for example in read_table()[1]:
            began = time.monotonic()
            row = {"source": example.source, "name": example.name, "request": f"{example.method} {example.path}"}
            row |= outcome(client, example.about(names), description)
            rows.append(row | {"seconds": round(time.monotonic() - began, 1)})
            print(row["source"], row["name"], row["outcome"], row.get("param") or "", *row["faults"], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a running server")
    options = parser.parse_args()
    with nullcontext(options.url) if options.url else served(default_max_tokens=MOST) as url:
        rows = run(url)
    counts = {kind: sum(row["outcome"] == kind for row in rows) for kind in ("answered", "refused", "failed")}
    faulty = sum(bool(row["faults"]) for row in rows)
    print(counts, f"{faulty} of {len(rows)} with faults")
    results = {"examples": len(rows), **counts, "with_faults": faulty, "sources": read_table()[0], "rows": rows}
    write("documented_examples", results)
    if faulty:
        raise SystemExit("not every example is answered or refused as it should be; see above")


if __name__ == "__main__":
    main()
