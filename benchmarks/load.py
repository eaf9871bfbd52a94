"""The embedded default under load, through `rapid serve`: more and more clients, ten minutes at capacity, a burst.

Clients mix short chats, new documents, documents of earlier questions, answers cancelled midway, and slow readers.
Every answer is compared with the answer that a client alone got. If it differs, it is replayed
(`benchmarks.common.replay`) when the service is down. The memory for keys and values is bounded, and full before the
ten minutes begin: from then on the memory of the processes should stay the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import psutil

from benchmarks.common.clients import KNOWN, Asked, Crowd, Question, ask, new_client
from benchmarks.common.memory import Memory
from benchmarks.common.replay import Checker, Replay
from benchmarks.common.results import FOLDER, write
from benchmarks.common.served import CONFIG, serving
from deployments.config import read_config

CLIENTS = (1, 4, 16, 64)
KV_GIB = 0.25  # of each engine
FILLING = 20  # documents; their passages alone fill more than KV_GIB
PROBE = Question(None, "Name a colour.")


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    return {
        name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)
        for name, share in (("p50", 0.5), ("p95", 0.95))
    }


def fairness(asked: list[Asked]) -> dict[str, float]:
    """The number of answers per client: Jain's index (1: all clients got equally many), the fewest and the most."""
    answers = Counter({one.client: 0 for one in asked}) + Counter(one.client for one in asked if one.status == 200)
    counts = [answers[client] for client in {one.client for one in asked}]
    jain = sum(counts) ** 2 / (len(counts) * sum(count**2 for count in counts))
    return {"jain": round(jain, 3), "fewest": min(counts), "most": max(counts)}


def row(asked: list[Asked], clients: int) -> dict[str, Any]:
    """The results of ``clients`` clients."""
    ended = max(one.started + (one.last_s or 0) for one in asked)
    seconds = ended - min(one.started for one in asked)
    read_at_once = [one for one in asked if one.kind != "slow"]
    return {
        "clients": clients,
        "seconds": round(seconds, 1),
        "requests": len(asked),
        "statuses": dict(Counter(str(one.status) for one in asked)),
        "errors": [one.error for one in asked if one.error and one.status in (0, 200)][:5],
        "tokens_per_second": round(sum(one.tokens for one in asked) / seconds, 1),
        "first_token_s": percentiles([one.first_s for one in read_at_once if one.first_s]),
        "first_token_s_of_short": percentiles([one.first_s for one in asked if one.first_s and one.kind == "short"]),
        "per_token_s": percentiles([one.per_token_s for one in read_at_once if one.per_token_s is not None]),
        "fairness": fairness(asked),
    }


async def measure(
    url: str, process: psutil.Process, checker: Checker, crowd: Crowd, options: argparse.Namespace
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    engine = read_config(CONFIG).target
    places = engine.max_sequences + engine.max_queued
    print(f"each of {len(KNOWN)} questions alone", flush=True)
    await checker.learn(KNOWN)
    alone_s = await _probes(url, 5)
    results["levels"] = []
    for clients in options.clients:
        results["levels"].append(row(await crowd.run(clients, options.level_s), clients))
        print(json.dumps(results["levels"][-1]), flush=True)
    best = _capacity(results["levels"])
    print("filling both engines' memory for keys and values", flush=True)
    await crowd.fill(FILLING)
    memory = Memory(url, process)
    watching = asyncio.create_task(memory.watch())
    print(f"{options.minutes:g} minutes with {best} clients", flush=True)
    results["sustained"] = row(await crowd.run(best, options.minutes * 60), best)
    watching.cancel()
    results["sustained"]["memory"] = memory.report()
    print(json.dumps(results["sustained"] | {"memory": memory.report() | {"samples": len(memory.samples)}}), flush=True)
    results["burst"] = await _burst(url, crowd, 3 * places, alone_s) | {"places": places}
    print(json.dumps(results["burst"]), flush=True)
    results["held_afterwards"] = await _held(url)
    return results


def _capacity(levels: list[dict[str, Any]]) -> int:
    """The fewest clients that keep the machine as busy as it can be; more clients only wait."""
    most = max(level["tokens_per_second"] for level in levels)
    return next(level["clients"] for level in levels if level["tokens_per_second"] >= 0.9 * most)


async def _probes(url: str, number: int) -> float:
    """The median time to the first token of a short chat when no other request runs."""
    async with new_client() as http:
        times = [(await ask(http, url, PROBE, "short")).first_s for _ in range(number)]
    return statistics.median(time for time in times if time)


async def _burst(url: str, crowd: Crowd, requests: int, alone_s: float) -> dict[str, Any]:
    """Sends more requests at once than there is room for, and measures the time until the service has recovered."""
    print(f"a burst of {requests}", flush=True)
    started = time.perf_counter()
    asked = await crowd.burst(requests)
    ended = time.perf_counter()
    refused = [one for one in asked if one.status in (429, 503)]
    while (first_s := await _probes(url, 1)) > 1.5 * alone_s + 0.05 and time.perf_counter() < ended + 60:
        await asyncio.sleep(0.1)
    return {
        "requests": requests,
        "statuses": dict(Counter(str(one.status) for one in asked)),
        "other_errors": [one.error for one in asked if one.error and one not in refused][:5],
        "all_ended_after_s": round(ended - started, 1),
        "first_token_s": percentiles([one.first_s for one in asked if one.first_s]),
        "recovered_s_after_the_last": round(time.perf_counter() - ended, 2),
        "probe_first_token_s": {"before": round(alone_s, 3), "after": round(first_s, 3)},
    }


async def _held(url: str) -> dict[str, int]:
    """The sequences and bytes that the engines hold ten seconds after the last request; it should be none."""
    async with new_client() as http:
        for _ in range(20):
            health = (await http.get(f"{url}/health")).json()
            held = {name: sum(health[name].values()) for name in ("sequences", "kv_bytes")}
            if not any(held.values()):
                break
            await asyncio.sleep(0.5)
    return held


def draw(results: dict[str, Any]) -> None:
    """Time to the first token by clients, and memory over time: benchmarks/results/load.svg."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    levels = [level for level in results["levels"] if level["first_token_s"]]
    clients = [level["clients"] for level in levels]
    for name, style in (("p50", "-"), ("p95", "--")):
        left.plot(clients, [level["first_token_s"][name] for level in levels], style, marker="o", label=f"{name}, all")
        short = [(level["first_token_s_of_short"] or {}).get(name) for level in levels]
        left.plot(clients, short, style, marker=".", color="grey", label=f"{name}, short chats")
    left.set(xscale="log", yscale="log", xlabel="clients", ylabel="seconds to the first token", xticks=clients)
    left.set_xticklabels(clients)
    left.legend()
    samples = results["sustained"]["memory"]["samples"]
    right.plot([s["s"] / 60 for s in samples], [s["rss_mib"] for s in samples], label="resident, all processes")
    right.plot([s["s"] / 60 for s in samples], [s["kv_mib"] for s in samples], label="keys and values of live requests")
    right.set(xlabel="minutes at capacity", ylabel="MiB", ylim=(0, None))
    right.legend()
    figure.savefig(FOLDER / "load.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="at capacity")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS, help="the numbers of them, in turn")
    parser.add_argument("--level-s", type=float, default=40, help="seconds for each number of clients")
    parser.add_argument("--new-replayed", type=int, default=30, help="answers about new documents that are checked")
    parser.add_argument("--dtype", default="auto", help="of the target; float32 rounds nothing away")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    engines = {"kv_memory_gib": KV_GIB}
    with serving(target=engines | {"dtype": options.dtype}, drafter=engines) as (url, server):
        checker, crowd = Checker(url), Crowd(url, options.seed)
        results = asyncio.run(measure(url, psutil.Process(server.pid), checker, crowd, options))
    print("replaying the answers that differ", flush=True)
    how = {"dtype": options.dtype, "kv_memory_gib": KV_GIB}
    with Replay.of(read_config(CONFIG).target.model_copy(update=how)) as replay:
        answers = checker.judge(crowd.asked, replay, options.new_replayed)
        results["answers"] = {"asked": len(crowd.asked), **answers, "control": checker.control(replay)}
    print(json.dumps(results["answers"]), json.dumps(results["held_afterwards"]))
    write("load", results, part="" if options.dtype == "auto" else options.dtype)
    if options.dtype == "auto":
        draw(results)


if __name__ == "__main__":
    main()
