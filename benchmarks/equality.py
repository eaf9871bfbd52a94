"""Greedy decoding, float32: every strategy, rule and draft length against transformers' own `generate`.

Every feature is on: prefixes are shared, so each prompt is prefilled once and every later run finds it; γ is fixed or
chosen; drafts are sampled or looked up. The prompts are passages of the shared texts, of about 2,000 and 6,000 tokens,
with a question.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rapid  # noqa: F401 (before torch)

# isort: split
import httpx
import torch
from transformers import AutoModelForCausalLM

from benchmarks.common.novels import build
from benchmarks.common.results import DATA, write
from deployments.builders import local_backend
from deployments.config import AppConfig, parse_config
from deployments.datastores import Datastores
from rapid.backend.local import LocalBackend
from rapid.events import Finish
from rapid.generate import generate
from rapid.request import GenerationRequest
from rapid.sampling.params import SamplingParams
from rapid.speculation.params import SpeculationParams
from rapid.speculation.verification import RULES
from rapid.text.prompts import Message, read_chat
from rapid.text.tokenizer import load_tokenizer
from rapid.weights.embedded_models import local_path

MODEL = "smollm2-135m-instruct"
GAMMAS = (1, 4, 10)
QUESTION = "Describe what happens in this passage, and who takes part in it."
PASSAGES = {2000: ("pride-and-prejudice.txt", 60_000, 8_200), 6000: ("moby-dick.txt", 200_000, 24_800)}


def matrix(only: str | None = None) -> list[dict[str, Any]]:
    """Every combination that must give the same text; those of one strategy where it is named."""
    return [row for row in _matrix() if only in (None, row["strategy"])]


def _matrix() -> Iterator[dict[str, Any]]:
    yield {"strategy": "autoregressive"}
    yield {"strategy": "lookup"}
    yield {"strategy": "magicdec"}
    yield {"strategy": "magicdec", "draft_cache": "window", "num_draft_tokens": 4}
    yield {"strategy": "triforce"}
    yield {"strategy": "rapid"}
    yield {"strategy": "rest"}
    for gamma in GAMMAS:
        for strategy in ("speculative", "rest", "magicdec", "triforce"):
            yield {"strategy": strategy, "num_draft_tokens": gamma}
        for rule in RULES:
            yield {"strategy": "rapid", "verification": rule, "num_draft_tokens": gamma}


def messages(length: int) -> list[dict[str, str]]:
    name, start, characters = PASSAGES[length]
    passage = (DATA / name).read_text(encoding="utf-8")[start : start + characters]
    return [{"role": "user", "content": f"{passage}\n\n{QUESTION}"}]


def config(datastore: Path) -> AppConfig:
    target = {"model": MODEL, "dtype": "float32"}
    drafter = {"model": MODEL, "quantization": "int4"}
    retriever = {"options": {"chunk_tokens": 256}}
    more = {"datastore": {"path": str(datastore)}}
    return parse_config({"target": target, "drafter": drafter, "retriever": retriever, **more})


async def in_core(
    length: int, new_tokens: int, backend: LocalBackend, settings: AppConfig, only: str | None
) -> list[dict[str, Any]]:
    """One after another, then four by `rest` at once."""
    tokenizer = load_tokenizer(MODEL)
    prompt = read_chat([Message(**message) for message in messages(length)], tokenizer)
    novels = Datastores(settings, tokenizer).of("")

    async def answer(row: dict[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        request = GenerationRequest(
            prompt=prompt,
            sampling=SamplingParams(temperature=0),
            speculation=SpeculationParams(**row),
            retrieval=settings.retriever.options,
            max_tokens=new_tokens,
            datastore=novels,
        )
        tokens: list[int] = []
        async for event in generate(request, backend):
            if isinstance(event, Finish):
                statistics = event.statistics
            else:
                tokens += event.tokens
        elapsed_s = round(time.perf_counter() - started, 2)
        print(f"  core {length} {_name(row):42} {elapsed_s:6.1f} s", flush=True)
        return row | {"tokens": tokens, **_numbers(statistics.__dict__), "s": elapsed_s}

    rows = [await answer(row) for row in matrix(only)]
    by_rest = [row for row in matrix(only) if row["strategy"] == "rest"]
    return rows + [row | {"at_once": len(by_rest)} for row in await asyncio.gather(*map(answer, by_rest))]


def over_http(url: str, length: int, new_tokens: int, only: str | None) -> Iterator[dict[str, Any]]:
    for row in matrix(only):
        started = time.perf_counter()
        body = {"model": MODEL, "messages": messages(length), "temperature": 0, "max_tokens": new_tokens, "rapid": row}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=600)
        answer.raise_for_status()
        text, numbers = answer.json()["choices"][0]["message"]["content"], _numbers(answer.json()["rapid"])
        print(f"  http {length} {_name(row):42} {time.perf_counter() - started:6.1f} s", flush=True)
        yield row | {"text": text, **numbers, "s": round(time.perf_counter() - started, 2)}


@contextmanager
def serving(settings: AppConfig) -> Iterator[str]:
    """Serves the application on a Ray of its own, and yields its URL."""
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
    parser.add_argument("--where", nargs="+", default=["core", "http"], choices=["core", "http"])
    parser.add_argument("--only", help="one strategy; writes equality_WHERE_ONLY.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        build(Path(place), MODEL)
        compare(options, config(Path(place)))


def compare(options: argparse.Namespace, settings: AppConfig) -> None:
    new_tokens = options.new_tokens
    references = {length: _reference(length, new_tokens) for length in options.lengths}
    all_identical = True

    if "core" in options.where:
        rows = []
        with local_backend(settings) as backend:
            for length in options.lengths:
                for row in asyncio.run(in_core(length, new_tokens, backend, settings, options.only)):
                    row["identical"] = row.pop("tokens") == references[length][0]
                    rows.append(row)
        all_identical &= report(_part("core", options.only), rows, new_tokens)
    if "http" in options.where:
        rows = []
        with serving(settings) as url:
            for length in options.lengths:
                for row in over_http(url, length, new_tokens, options.only):
                    row["identical"] = row.pop("text") == references[length][1]
                    rows.append(row)
                    all_identical &= report(_part("http", options.only), rows, new_tokens)
    if not all_identical:
        raise SystemExit(1)


def _part(where: str, only: str | None) -> str:
    return where if only is None else f"{where}_{only}"


def report(where: str, rows: list[dict[str, Any]], new_tokens: int) -> bool:
    """Writes the results so far; True when all answers were identical."""
    identical = sum(row["identical"] for row in rows)
    print(f"{where}: {identical} of {len(rows)} runs identical to transformers' generate")
    write("equality", {"new_tokens": new_tokens, "identical": identical, "runs": len(rows), "rows": rows}, part=where)
    return identical == len(rows)


if __name__ == "__main__":
    main()
