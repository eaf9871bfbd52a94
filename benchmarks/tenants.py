"""What a hostile key costs an honest one: its first token and its tokens per second, alone and beside each attack.

Both have keys of one service on this machine. The attacks come from a process of its own, eight at a time, each again
as soon as it is answered. The honest client asks one question after another: a short chat, then `rag` about a document.

The attacker's process shares the cores with the service, which it would not do elsewhere. So one more row, `computing`,
has a process in its place that computes as long and asks nothing: what is like it is not the server's doing. And each
row says how much processor time each process had, as a share of one core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
import ray
from ray import serve

from benchmarks.common.clients import MODEL, passage
from benchmarks.common.memory import process_name
from benchmarks.common.results import write
from cluster.processes import ENVIRONMENT
from deployments.app import build
from deployments.cli.serve import EDGE, SETUP
from deployments.config import parse_config

PORT = 8127
URL = f"http://127.0.0.1:{PORT}"
HONEST, HOSTILE = "honest", "hostile"
CONCURRENT = 8
NEW_TOKENS = 24
STAY_S = 1.0  # of a client that leaves
SETTLE_S = 2.0
COMPUTING = "computing"
Attack = Callable[[httpx.AsyncClient, int], Awaitable[httpx.Response]]


@contextmanager
def service() -> Iterator[None]:
    """The application on this machine; ready when it yields."""
    os.environ.update(ENVIRONMENT | SETUP | EDGE)
    engine = {"model": MODEL, "kv_memory_gib": 0.5, "max_sequences": 4, "num_cpus": 0.1, "threads": 1}
    with TemporaryDirectory() as folder:
        config = {
            "target": engine,
            "drafter": engine | {"quantization": "int4"},
            "retriever": {"options": {"chunk_tokens": 256}},
            "files": {"folder": folder, "max_stored_mb": 20},
            "access": {"api_keys": [HONEST, HOSTILE]},
        }
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": PORT})
            serve.run(build(parse_config(config)), name="rapid", route_prefix="/")
            yield
        finally:
            ray.shutdown()


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, **more}


def client_of(key: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.AsyncClient(base_url=URL, headers=headers, timeout=120, limits=limits, trust_env=False)


def noise(length: int, seed: int) -> str:
    """Hexadecimal digits, which have more tokens than words have."""
    return random.Random(seed).randbytes(length // 2).hex()


async def schema(client: httpx.AsyncClient, _: int) -> httpx.Response:
    level = {"type": "object", "required": ["a"], "additionalProperties": False}
    chain = {f"d{i}": {**level, "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(925)}
    named = {"name": "x", "schema": {"$defs": {**chain, "d925": {"type": "string"}}, "$ref": "#/$defs/d0"}}
    wanted = {"type": "json_schema", "json_schema": named}
    return await client.post("/v1/chat/completions", json=chat("Go.", response_format=wanted))


async def wrong_body(client: httpx.AsyncClient, _: int) -> httpx.Response:
    body = b'{"model": "%s", "prompt": [%s]}' % (MODEL.encode(), b",".join([b"null"] * 150_000))
    return await client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})


async def long_prompt(client: httpx.AsyncClient, _: int) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=chat("a b c d e f g h " * 94_000))


async def tokenize(client: httpx.AsyncClient, _: int) -> httpx.Response:
    return await client.post("/tokenize", json={"prompt": "a b c d e f g h " * 8_000})


async def retrieval_left(client: httpx.AsyncClient, i: int) -> httpx.Response:
    """About as much text as is read for `rag`, in the smallest chunks, asked for by a client that does not wait."""
    options = {"strategy": "rag", "retrieval": {"chunk_tokens": 16, "max_tokens": 64}}
    body = chat(f"{noise(60_000, i)}\n\nWhat?", max_tokens=1, rapid=options)
    async with asyncio.timeout(STAY_S):
        return await client.post("/v1/chat/completions", json=body)


async def kept(client: httpx.AsyncClient, i: int) -> httpx.Response:
    options = {"strategy": "rag", "retrieval": {"chunk_tokens": 64, "keep": True}}
    body = chat(f"{noise(30_000, i)}\n\nWhat?", max_tokens=1, rapid=options)
    return await client.post("/v1/chat/completions", json=body)


async def upload(client: httpx.AsyncClient, i: int) -> httpx.Response:
    return await client.post("/v1/files", files={"file": ("a.txt", noise(2_000_000, i).encode())})


async def hard_file(client: httpx.AsyncClient, i: int) -> httpx.Response:
    page = b"<html><body>%d" % i + b"<b>x</b>" * 250_000
    return await client.post("/v1/files", files={"file": ("a.html", page)})


async def many_choices(client: httpx.AsyncClient, i: int) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=chat(f"Count to {i}.", n=4, max_tokens=200, ignore_eos=True))


async def embeddings(client: httpx.AsyncClient, i: int) -> httpx.Response:
    texts = [noise(400, CONCURRENT * i + j) for j in range(64)]
    return await client.post("/v1/embeddings", json={"model": MODEL, "input": texts})


async def wrong_key(client: httpx.AsyncClient, i: int) -> httpx.Response:
    return await client.post("/v1/completions", json={}, headers={"Authorization": f"Bearer guess{i}"})


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        *(schema, wrong_body, long_prompt, tokenize, retrieval_left),
        *(kept, upload, hard_file, many_choices, embeddings, wrong_key),
    )
}


def attack(name: str, stop: Any, answers: Any) -> None:
    """Runs one attack until ``stop`` is set; puts (status, how often) into ``answers``, with 0 for no answer."""
    os.nice(19)  # behind the service: its own work is not what is measured
    if name == COMPUTING:
        while not stop.is_set():
            sum(range(100_000))
        return answers.put({})
    statuses: Counter[int] = Counter()

    async def again_and_again(first: int) -> None:
        async with client_of(HOSTILE) as client:
            i = first
            while True:
                status = 0
                with suppress(httpx.HTTPError, TimeoutError):
                    status = (await ATTACKS[name](client, i)).status_code
                statuses[status] += 1
                i += CONCURRENT

    async def until_stopped() -> None:
        tasks = [asyncio.create_task(again_and_again(i)) for i in range(CONCURRENT)]
        await asyncio.to_thread(stop.wait)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(until_stopped())
    answers.put(dict(statuses))


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[float, float]:
    """(seconds to the first token, tokens per second behind it)"""
    started, times = time.perf_counter(), []
    async with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                data = json.loads(line[6:])
                if "error" in data:
                    raise RuntimeError(data["error"]["message"])
                if data["choices"] and data["choices"][0]["delta"].get("content"):
                    times.append(time.perf_counter())
    return times[0] - started, (NEW_TOKENS - 1) / (times[-1] - times[0])


async def honest(seconds: float) -> dict[str, Any]:
    """Questions of the honest key for so long, at least four of each kind."""
    plain = chat("Name three oceans.", max_tokens=NEW_TOKENS, ignore_eos=True, rapid={"strategy": "autoregressive"})
    about = chat(f"{passage(0)}\n\nWho is speaking?", max_tokens=NEW_TOKENS, ignore_eos=True, rapid={"strategy": "rag"})
    chats, rags = [], []
    began = time.monotonic()
    async with client_of(HONEST) as client:
        while len(rags) < 4 or time.monotonic() - began < seconds:
            chats.append(await ask(client, plain))
            rags.append(await ask(client, about))
    return {
        "questions": len(chats) + len(rags),
        "first_token_s_p95": round(_p95([first for first, _ in chats]), 3),
        "tokens_per_second_median": round(statistics.median(rate for _, rate in chats), 1),
        "rag_first_token_s_p95": round(_p95([first for first, _ in rags]), 3),
    }


def cpu_seconds() -> Counter[str]:
    """What this process and all below it have computed so far, by name; those of a kind together."""
    spent: Counter[str] = Counter()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            name, times = process_name(process), process.cpu_times()
            spent[name] += times.user + times.system
    return spent


def _p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


def beside(name: str, seconds: float) -> dict[str, Any]:
    """What the honest client sees beside one attack, and how that was answered."""
    context = multiprocessing.get_context("spawn")
    stop, answers = context.Event(), context.Queue()
    hostile = context.Process(target=attack, args=(name, stop, answers))
    hostile.start()
    try:
        time.sleep(SETTLE_S)
        before, began = cpu_seconds(), time.monotonic()
        seen = asyncio.run(honest(seconds))
        spent, took_s = cpu_seconds() - before, time.monotonic() - began
        stop.set()
        shares = {name: round(s / took_s, 2) for name, s in spent.most_common() if s / took_s >= 0.02}
        return seen | {"answers_to_the_attack": answers.get(timeout=60), "cores": shares}
    finally:
        stop.set()
        hostile.join(30)
        if hostile.is_alive():
            hostile.kill()


def forget_uploads() -> None:
    """Deletes what an attack has stored, so that it is not embedded beside the next one."""
    with httpx.Client(base_url=URL, headers={"Authorization": f"Bearer {HOSTILE}"}, timeout=120) as client:
        for file in client.get("/v1/files").json()["data"]:
            client.delete(f"/v1/files/{file['id']}").raise_for_status()


def worse(alone: dict[str, Any], seen: dict[str, Any]) -> dict[str, float]:
    return {
        "first_token": round(seen["first_token_s_p95"] / alone["first_token_s_p95"], 2),
        "tokens_per_second": round(alone["tokens_per_second_median"] / seen["tokens_per_second_median"], 2),
        "rag_first_token": round(seen["rag_first_token_s_p95"] / alone["rag_first_token_s_p95"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=12.0, help="of questions beside each attack")
    parser.add_argument("--attacks", nargs="*", choices=[COMPUTING, *ATTACKS], default=[COMPUTING, *ATTACKS])
    options = parser.parse_args()
    with service():
        asyncio.run(honest(0))  # the first ones are slower
        alone = asyncio.run(honest(options.seconds))
        print(f"alone: {alone}", flush=True)
        table = {}
        for name in options.attacks:
            seen = beside(name, options.seconds)
            forget_uploads()
            table[name] = seen | {"times_worse": worse(alone, seen)}
            print(f"{name}: {table[name]}", flush=True)
    write("tenants", {"concurrent": CONCURRENT, "alone": alone, "beside": table})


if __name__ == "__main__":
    main()
