"""Greedy decoding, float32: every strategy, rule and draft length against transformers' own `generate`.

In the core each prompt is prefilled once and its cache copied for every run. Over HTTP every request does everything,
so the long prompt is asked with half of the combinations unless --all is given. The prompts are passages of the shared
texts, of about 2,000 and 6,000 tokens, with a question.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import rapid  # noqa: F401 (before torch)

# isort: split
import httpx
import torch
from transformers import AutoModelForCausalLM

from benchmarks.results import DATA, write
from deployments.config import AppConfig, parse_config
from rapid.catalog import local_path
from rapid.engine import Engine
from rapid.generate import Finish, GenerationRequest, Lease, Role, SpeculationParams, generate
from rapid.kv_cache import KVCache
from rapid.local import LocalBackend
from rapid.model import Model
from rapid.prompts import Message, read_chat
from rapid.sampling import SamplingParams
from rapid.speculative import RULES
from rapid.tokenization import load_tokenizer

MODEL = "smollm2-135m-instruct"
GAMMAS = (1, 4, 10)
QUESTION = "Describe what happens in this passage, and who takes part in it."
PASSAGES = {2000: ("pride-and-prejudice.txt", 60_000, 8_200), 6000: ("moby-dick.txt", 200_000, 24_800)}


def matrix() -> Iterator[dict[str, Any]]:
    """Every combination that has to give the same text."""
    yield {"strategy": "autoregressive"}
    for gamma in GAMMAS:
        yield {"strategy": "speculative", "num_draft_tokens": gamma}
        for rule in RULES:
            yield {"strategy": "rapid", "verification": rule, "num_draft_tokens": gamma}


def half() -> Iterator[dict[str, Any]]:
    """Every strategy and rule once, and `rapid` with every draft length."""
    yield {"strategy": "autoregressive"}
    yield {"strategy": "speculative", "num_draft_tokens": 4}
    for gamma in GAMMAS[:-1]:
        yield {"strategy": "rapid", "verification": "published", "num_draft_tokens": gamma}
    for rule in RULES:
        yield {"strategy": "rapid", "verification": rule, "num_draft_tokens": GAMMAS[-1]}


def messages(length: int) -> list[dict[str, str]]:
    name, start, characters = PASSAGES[length]
    passage = (DATA / name).read_text(encoding="utf-8")[start : start + characters]
    return [{"role": "user", "content": f"{passage}\n\n{QUESTION}"}]


def config() -> AppConfig:
    engine = {"model": MODEL, "dtype": "float32"}
    options = {"chunk_tokens": 256}
    return parse_config({"target": engine, "drafter": engine, "retriever": {"options": options}})


class _PrefillOnce(LocalBackend):
    """Keeps the cache of every prompt it has read, and starts later sequences on it from a copy."""

    def __init__(self, engine: Engine, retrieve: Any) -> None:
        super().__init__(engine, engine, retrieve)
        self._read: dict[tuple[int, ...], KVCache] = {}

    @asynccontextmanager
    async def lease(self, role: Role, capacity: int, sampling: SamplingParams) -> AsyncIterator[Lease]:
        async with super().lease(role, capacity, sampling) as lease:
            read, sequence = lease.prefill, lease._sequence  # type: ignore[attr-defined]

            async def prefill(prompt: list[int]) -> float:
                known = self._read.get(tuple(prompt))
                if known is None:
                    elapsed_ms = await read(prompt)
                    self._read[tuple(prompt)] = known = self._engines[role].model.new_cache(len(prompt))
                    _copy(sequence.cache, known)
                    return elapsed_ms
                sequence.prompt = prompt
                _copy(known, sequence.cache)
                return 0.0

            lease.prefill = prefill  # type: ignore[method-assign]
            yield lease


def _copy(source: KVCache, target: KVCache) -> None:
    target.keys[:, :, : source.length] = source.keys[:, :, : source.length]
    target.values[:, :, : source.length] = source.values[:, :, : source.length]
    target.length = source.length


async def in_core(length: int, new_tokens: int, backend: LocalBackend, settings: AppConfig) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(MODEL)
    prompt = read_chat([Message(**message) for message in messages(length)], tokenizer)
    rows = []
    for row in matrix():
        started = time.perf_counter()
        request = GenerationRequest(
            prompt=prompt,
            sampling=SamplingParams(temperature=0),
            speculation=SpeculationParams(**row),
            retrieval=settings.retriever.options,
            max_tokens=new_tokens,
        )
        tokens: list[int] = []
        async for event in generate(request, backend):
            if isinstance(event, Finish):
                statistics = event.statistics
            else:
                tokens += event.tokens
        rows.append(row | {"tokens": tokens, **_numbers(statistics.__dict__), "s": time.perf_counter() - started})
        print(f"  core {length} {_name(row):42} {time.perf_counter() - started:6.1f} s", flush=True)
    return rows


def over_http(url: str, length: int, new_tokens: int, combinations: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for row in combinations:
        started = time.perf_counter()
        body = {"model": MODEL, "messages": messages(length), "temperature": 0, "max_tokens": new_tokens, "rapid": row}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=600)
        answer.raise_for_status()
        text, numbers = answer.json()["choices"][0]["message"]["content"], _numbers(answer.json()["rapid"])
        rows.append(row | {"text": text, **numbers, "s": time.perf_counter() - started})
        print(f"  http {length} {_name(row):42} {time.perf_counter() - started:6.1f} s", flush=True)
    return rows


@contextmanager
def serving(settings: AppConfig) -> Iterator[str]:
    """The application on a Ray of its own, at the URL that it yields."""
    import ray
    from ray import serve

    from deployments.app import build

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": 8017})
        serve.run(build(settings), name="rapid", route_prefix="/")
        yield "http://127.0.0.1:8017"
    finally:
        serve.shutdown()
        ray.shutdown()


def _reference(length: int, new_tokens: int) -> tuple[list[int], str]:
    """transformers' own greedy continuation, with its stock attention and cache."""
    tokenizer = load_tokenizer(MODEL)
    network = AutoModelForCausalLM.from_pretrained(local_path(MODEL), dtype=torch.float32)
    ids = torch.tensor([read_chat([Message(**m) for m in messages(length)], tokenizer).tokens])
    output = network.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
    )
    tokens = output[0, ids.shape[1] :].tolist()
    print(f"  transformers' generate: {ids.shape[1]} tokens of prompt, {len(tokens)} new", flush=True)
    return tokens, str(tokenizer.decode(tokens, skip_special_tokens=True))


def _numbers(statistics: dict[str, Any]) -> dict[str, int]:
    return {name: statistics[name] for name in ("prompt_tokens", "rounds", "drafted", "accepted")}


def _name(row: dict[str, Any]) -> str:
    return " ".join(str(value) for value in row.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(PASSAGES), choices=list(PASSAGES))
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--no-http", action="store_true")
    parser.add_argument("--all", action="store_true", help="all combinations over HTTP with the long prompt, too")
    options = parser.parse_args()
    settings, new_tokens = config(), options.new_tokens
    references = {length: _reference(length, new_tokens) for length in options.lengths}
    rows: list[dict[str, Any]] = []

    from deployments.assembly import build_retriever

    engine = Engine(Model.load(MODEL, dtype="float32"))
    backend = _PrefillOnce(engine, build_retriever(settings.retriever, MODEL).retrieve)
    for length in options.lengths:
        for row in asyncio.run(in_core(length, new_tokens, backend, settings)):
            rows.append({"where": "core", **row, "identical": row.pop("tokens") == references[length][0]})
    engine.shutdown()
    report(rows, new_tokens)
    if not options.no_http:
        with serving(settings) as url:
            for length in options.lengths:
                combinations = matrix() if options.all or length < 4000 else half()
                for row in over_http(url, length, new_tokens, combinations):
                    rows.append({"where": "http", **row, "identical": row.pop("text") == references[length][1]})

    if report(rows, new_tokens) < len(rows):
        raise SystemExit(1)


def report(rows: list[dict[str, Any]], new_tokens: int) -> int:
    """Writes what has been seen so far; returns how many runs were identical."""
    for row in rows:
        row.pop("tokens", None)
        row.pop("text", None)
        row["s"] = round(row["s"], 2)
    identical = sum(row["identical"] for row in rows)
    print(f"{identical} of {len(rows)} runs identical to transformers' generate")
    write("equality", {"new_tokens": new_tokens, "identical": identical, "runs": len(rows), "rows": rows})
    return identical


if __name__ == "__main__":
    main()
