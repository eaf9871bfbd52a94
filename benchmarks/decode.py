"""Decode speed on long prompts: plain decoding and the strategies that draft side by side, then the peers.

Each prompt is prefilled once, and every later run finds it in the KV cache, RAPID's and the peers' alike. So the timed
part is decoding: from the first token to the last; of `speculative_rag`, whose answer comes whole, it is drafting and
scoring. `rest` has a datastore of the two novels that the prompts are passages of, and `rapid` has none. Only the
prompts are fixed: every setting is the default. Where a prompt is longer than the model's window its positions are
scaled; then only the speed means something.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import rapid  # noqa: F401 (before torch)

# isort: split
import torch

from benchmarks.common import peers
from benchmarks.common.local import MODEL, Run, config, run, with_window
from benchmarks.common.novels import build
from benchmarks.common.questions import Question, questions
from benchmarks.common.results import write
from deployments.builders import local_backend
from deployments.config import AppConfig
from rapid.backend.local import LocalBackend
from rapid.datastore.folder import DatastoreFolder
from rapid.datastore.search import Datastore
from rapid.engine.torch_thread import compute
from rapid.text.tokenizer import fingerprint, load_tokenizer

STRATEGIES = ("autoregressive", "rapid", "lookup", "rest", "magicdec", "triforce", "speculative_rag")
LONGEST_FOR_PEERS = 7_500  # tokens


async def ours(
    backend: LocalBackend, settings: AppConfig, asked: list[Question], new_tokens: int, novels: Datastore
) -> list[dict[str, Any]]:
    rows = []
    for question in asked:
        reading = await run(backend, settings, question.prompt, 0, 2, strategy="autoregressive")
        await run(
            backend, settings, question.prompt, 0, 2, strategy="rapid", num_draft_tokens=1
        )  # the drafter's prompt
        for temperature in (0.0, 0.5):
            runs = {
                strategy: await run(
                    backend,
                    settings,
                    question.prompt,
                    temperature,
                    new_tokens,
                    datastore=novels if strategy == "rest" else None,
                    strategy=strategy,
                )
                for strategy in STRATEGIES
            }
            rows.append(_row(question, temperature, runs))
            if not reading.statistics.cached_tokens:
                rows[-1]["prefill_tokens_per_second"] = round(len(question.prompt.tokens) / reading.first_s, 1)
            _print(rows[-1])
    return rows


def _row(question: Question, temperature: float, runs: dict[str, Run]) -> dict[str, Any]:
    plain = runs["autoregressive"]
    row: dict[str, Any] = {
        "document": question.document,
        "question": question.question,
        "prompt_tokens": len(question.prompt.tokens),
        "temperature": temperature,
    }
    for strategy, timed in runs.items():
        counted = timed.statistics
        row[strategy] = {
            "tokens_per_second": round(timed.tokens_per_second, 2),
            "ratio": round(timed.tokens_per_second / plain.tokens_per_second, 3),
            "emitted": counted.emitted,
            "rounds": counted.rounds,
            "drafted": counted.drafted,
            "accepted": counted.accepted,
            "lookup_drafted": counted.lookup_drafted,
            "lookup_accepted": counted.lookup_accepted,
            "datastore_drafted": counted.datastore_drafted,
            "datastore_accepted": counted.datastore_accepted,
        }
    return row


def _print(row: dict[str, Any]) -> None:
    speeds = "  ".join(
        f"{name} {row[name]['tokens_per_second']:5.1f}/s {row[name]['ratio']:4.2f}x" for name in STRATEGIES
    )
    print(f"  {row['document'][:18]:18} {row['question'][:30]:30} T={row['temperature']:<4}{speeds}", flush=True)


def theirs(asked: list[Question], num_documents: int, new_tokens: int, shorts: list[list[int]]) -> list[dict[str, Any]]:
    """The peers, one question a document, greedy; null if today's transformers refuses."""
    rows = []
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        network, assistant = peers.load(MODEL, dtype), peers.load(MODEL, dtype)
        for question, short in list(zip(asked, shorts, strict=True))[::2][:num_documents]:
            tokens = question.prompt.tokens
            cache, prefill = peers.prefilled(network, tokens)
            row: dict[str, Any] = {
                "document": question.document,
                "dtype": name,
                "prefill_tokens_per_second": round(prefill, 1),
            }
            generated = partial(peers.generated, network, tokens, cache, new_tokens)
            ways = {
                "generate": generated,
                "assisted": partial(generated, assistant_model=assistant),
                "prompt_lookup": partial(generated, prompt_lookup_num_tokens=peers.GAMMA),
                "released_rapid": partial(peers.released, network, assistant, tokens, cache, short, new_tokens),
            }
            for way, measure in ways.items():
                try:
                    row[way] = round(measure(), 2)
                except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                    row[way], row[f"{way}_error"] = None, f"{type(error).__name__}: {error}"[:200]
                print(f"  {name} {question.document[:18]:18} {way:15} {row[way]}", flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=6900)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--peer-tokens", type=int, default=64)
    parser.add_argument("--peer-documents", type=int, default=1, help="one takes about four minutes")
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--part", help="writes decode_PART.json; the prompt's tokens when that is short")
    options = parser.parse_args()
    if not options.without_peers and options.prompt_tokens > LONGEST_FOR_PEERS:
        parser.error(f"peers read at most {LONGEST_FOR_PEERS} tokens: add --without-peers")
    asked = list(questions(load_tokenizer(MODEL), options.prompt_tokens))[: options.questions]
    with ExitStack() as open_while_measured:
        target = open_while_measured.enter_context(with_window(options.prompt_tokens + options.new_tokens + 512))
        place = open_while_measured.enter_context(tempfile.TemporaryDirectory())
        settings = config(target=target)
        backend = open_while_measured.enter_context(local_backend(settings))
        build(Path(place), MODEL)
        novels = Datastore(DatastoreFolder(Path(place), fingerprint(load_tokenizer(MODEL))).segments())
        rows = asyncio.run(ours(backend, settings, asked, options.new_tokens, novels))
        shorts = [_short(backend, settings, question) for question in asked]
    results: dict[str, Any] = {"new_tokens": options.new_tokens, "rows": rows}
    reading = [row["prefill_tokens_per_second"] for row in rows if "prefill_tokens_per_second" in row]
    results["prefill_tokens_per_second"] = statistics.median(reading)
    print(f"prefill {results['prefill_tokens_per_second']} tokens/s")
    for strategy in STRATEGIES:
        speeds = [row[strategy]["tokens_per_second"] for row in rows]
        ratios = [row[strategy]["ratio"] for row in rows]
        results[strategy] = {
            "median_tokens_per_second": statistics.median(speeds),
            "mean_ratio": round(statistics.mean(ratios), 3),
            "median_ratio": statistics.median(ratios),
            "worst_ratio": min(ratios),
        }
        print(f"{strategy:15} {results[strategy]}")
    is_usual = 6000 < options.prompt_tokens <= LONGEST_FOR_PEERS
    part = options.part or ("" if is_usual else str(options.prompt_tokens))
    write("decode", results, part=part)
    if not options.without_peers:
        results["peers"] = compute(theirs, asked, options.peer_documents, options.peer_tokens, shorts)
        measured = {name for row in results["peers"] for name, value in row.items() if isinstance(value, float)}
        for way in sorted(measured):
            for dtype in ("float32", "bfloat16"):
                known = [r[way] for r in results["peers"] if r["dtype"] == dtype and r.get(way) is not None]
                if known:
                    results[f"{way}_{dtype}"] = statistics.median(known)
                    reads = way == "prefill_tokens_per_second"
                    own = results[way] if reads else results["rapid"]["median_tokens_per_second"]
                    ratio = own / statistics.median(known)
                    print(f"{way} {dtype}: {statistics.median(known)} tokens/s; rapid is {ratio:.2f}x")
        write("decode", results, part=part)


def _short(backend: LocalBackend, settings: AppConfig, question: Question) -> list[int]:
    retrieval = asyncio.run(
        backend.retrieve(question.prompt.contents, question.prompt.query, settings.retriever.options)
    )
    return question.prompt.shortened(retrieval.chunks) if retrieval.chunks else question.prompt.tokens[-1000:]


if __name__ == "__main__":
    main()
