"""The load mix, while processes hang and are killed at random, bodies are hostile and clients leave.

Every accepted answer must end: whole, or with an error that says why. An answer that differs from the one a client
alone got is replayed (`benchmarks.common.replay`). The command stops and ends only processes of its own cluster.

Memory is that of the processes that live throughout, that of each kind, of which others may live at the end than at the
beginning, and that of a process of each kind by its age: all that is resident, and the private part of it, which counts
no pages of Ray's object store and of files.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from benchmarks.chaos import MODEL, URL, processes
from benchmarks.common.clients import KNOWN, Asked, Crowd, new_client
from benchmarks.common.malformed import Attacker, strike
from benchmarks.common.memory import Memory
from benchmarks.common.replay import Checker, Replay
from benchmarks.common.results import write
from benchmarks.hangs import health, service
from deployments.engine_config import EngineConfig

# Of the coordinator, answers end with an error; of the others, they go on elsewhere or do without.
KINDS = {
    "engine": "EngineActor",
    "target replica": "ServeReplica:rapid:Target",
    "drafter replica": "ServeReplica:rapid:Drafter",
    "retriever": "ServeReplica:rapid:Retriever",
    "coordinator": "ServeReplica:rapid:Coordinator",
    "controller": "ServeController",
}
TARGETS, NUM_ENGINES = 2, 3
STOPPED_S = 20.0  # then it is continued, if it is still there
RECOVERY_LIMIT_S = 180.0
ATTACKS_AT_ONCE, ATTACKS_EVERY_S = 16, 10.0
DENSE_S = 300.0  # in which attacks come without a pause: what is rare has happened before growth is counted
AGES_MIN = ((1, 2), (2, 4), (4, 8), (8, 16), (16, 32))
FEWEST_SAMPLES = 6


@dataclass
class Faults:
    """What was done to which kind of process, and how long the application took to be whole again."""

    chance: random.Random
    done: Counter[str] = field(default_factory=Counter)
    recovered_s: list[float] = field(default_factory=list)
    at_s: list[tuple[float, str]] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)

    async def run(self, until: float, every_s: float) -> None:
        async with httpx.AsyncClient() as client:
            while time.monotonic() < until:
                await asyncio.sleep(self.chance.uniform(0.5, 1.5) * every_s)
                await self._one(client)

    async def _one(self, client: httpx.AsyncClient) -> None:
        kind, sent = self.chance.choice(list(KINDS)), self.chance.choice((signal.SIGSTOP, signal.SIGKILL))
        if not (candidates := processes(KINDS[kind])):
            return
        process = self.chance.choice(candidates)
        process.send_signal(sent)
        began = time.monotonic()
        name = f"{kind} {'stopped' if sent == signal.SIGSTOP else 'killed'}"
        self.done[name] += 1
        self.at_s.append((round(began - self._started, 1), name))
        is_continued = sent == signal.SIGKILL
        while time.monotonic() < began + RECOVERY_LIMIT_S:
            await asyncio.sleep(0.5)
            if not is_continued and time.monotonic() > began + STOPPED_S:
                is_continued = True
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)
            is_over = is_continued or not process.is_running()
            if is_over and len(processes("EngineActor")) == NUM_ENGINES and await health(client) == "ok":
                break
        self.recovered_s.append(round(time.monotonic() - began, 1))
        print(f"  {name}; whole after {self.recovered_s[-1]} s", flush=True)


async def hostile(until: float, seed: int) -> Counter[str]:
    """Sends malformed bodies, and returns how often each status came."""
    answers: Counter[str] = Counter()
    async with new_client() as http:
        openapi = (await http.get(f"{URL}/openapi.json")).json()
    attacks = Attacker(openapi, MODEL, seed).attacks(10**9)
    dense_until = time.monotonic() + DENSE_S
    while time.monotonic() < until:
        outcome = await strike(URL, (next(attacks) for _ in range(ATTACKS_AT_ONCE)))
        for statuses in outcome.statuses.values():
            answers.update(statuses)
        await asyncio.sleep(ATTACKS_EVERY_S if time.monotonic() > dense_until else 0)
    return answers


Sizes = list[tuple[float, dict[str, float]]]  # (seconds, MiB by process), again and again


def memory_of(samples: list[dict[str, Any]], what: str) -> dict[str, Any]:
    """The three tables of ``what``, "rss" or "private"."""
    sizes = [(sample["s"], sample[f"{what}_mib_by_process"]) for sample in samples]
    return {"growth": growth(sizes), "by_kind": by_kind(sizes), "by_age": by_age(sizes), "by_minute": by_minute(sizes)}


def growth(sizes: Sizes) -> dict[str, float]:
    """MiB from the median of the second third to that of the last, of the processes in all of them."""
    second, last = (sizes[i * len(sizes) // 3 : (i + 1) * len(sizes) // 3] for i in (1, 2))

    def median(part: Sizes, name: str) -> float:
        return statistics.median(of[name] for _, of in part)

    return {name: round(median(last, name) - median(second, name), 1) for name in _throughout([*second, *last])}


def by_kind(sizes: Sizes) -> dict[str, list[float]]:
    """MiB of all processes of a kind together, the median of each third."""

    def summed(of: dict[str, float]) -> Counter[str]:
        kinds: Counter[str] = Counter()
        for process, size in of.items():
            kinds[process.rpartition(" ")[0]] += size
        return kinds

    thirds = [[summed(of) for _, of in sizes[i * len(sizes) // 3 : (i + 1) * len(sizes) // 3]] for i in range(3)]
    names = sorted({kind for part in thirds for of in part for kind in of})
    return {kind: [round(statistics.median(of[kind] for of in part), 1) for part in thirds] for kind in names}


def by_age(sizes: Sizes) -> dict[str, dict[str, float]]:
    """MiB of one process of a kind, the median at each age; of processes that began under way, whose age is known."""
    began: dict[str, float] = {}
    seen: dict[str, dict[str, list[float]]] = {}
    for at_s, of in sizes:
        for process, size in of.items():
            age_min = (at_s - began.setdefault(process, at_s)) / 60
            band = next((f"{low} to {high} min" for low, high in AGES_MIN if low <= age_min < high), None)
            if band and began[process] > sizes[0][0]:
                seen.setdefault(process.rpartition(" ")[0], {}).setdefault(band, []).append(size)
    return {
        kind: {band: round(statistics.median(of), 1) for band, of in bands.items() if len(of) >= FEWEST_SAMPLES}
        for kind, bands in sorted(seen.items())
        if len(bands) > 1
    }


def by_minute(sizes: Sizes) -> dict[str, list[float]]:
    """MiB of each process that lived throughout, the median of each minute."""
    minutes: dict[int, Sizes] = {}
    for at_s, of in sizes:
        minutes.setdefault(int(at_s // 60), []).append((at_s, of))
    return {
        name: [round(statistics.median(of[name] for _, of in minute), 1) for minute in minutes.values()]
        for name in _throughout(sizes)
    }


def _throughout(sizes: Sizes) -> list[str]:
    return sorted(set(sizes[0][1]).intersection(*(of for _, of in sizes)))


def row(asked: list[Asked]) -> dict[str, Any]:
    errors = Counter(one.error for one in asked if one.error and one.status == 200)
    return {
        "requests": len(asked),
        "statuses": dict(Counter(str(one.status) for one in asked)),
        "complete": sum(one.is_complete for one in asked),
        "left": sum(one.kind == "cancelled" and not one.is_complete for one in asked),
        "ended_with_an_error": errors.total(),
        "lost": sum(one.is_lost and one.error is None for one in asked),
        "errors": dict(errors.most_common(8)),
    }


async def storm(options: argparse.Namespace, checker: Checker, crowd: Crowd) -> dict[str, Any]:
    await checker.learn(KNOWN)
    memory, faults = Memory(URL, psutil.Process()), Faults(random.Random(options.seed))
    watching = asyncio.create_task(memory.watch())
    until = time.monotonic() + 60 * options.minutes
    asked, _, answers = await asyncio.gather(
        crowd.run(options.clients, 60 * options.minutes),
        faults.run(until, options.every_s),
        hostile(until, options.seed),
    )
    watching.cancel()
    return {
        "faults": dict(faults.done),
        "whole_again_s": {"median": statistics.median(faults.recovered_s), "worst": max(faults.recovered_s)},
        "streams": row(asked),
        "hostile_bodies": dict(answers),
        "faults_at_s": faults.at_s,
        "resident_mib": memory_of(memory.samples, "rss"),
        "private_mib": memory_of(memory.samples, "private"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--every-s", type=float, default=20, help="between two faults, on average")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", default="", help="the results' file is storm_PART.json")
    options = parser.parse_args()
    about = {"minutes": options.minutes, "clients": options.clients}
    about["load_average_before"] = round(os.getloadavg()[0], 1)  # of a machine that others may use, too
    with service(targets=TARGETS, ranks=1):
        checker, crowd = Checker(URL), Crowd(URL, options.seed)
        results = asyncio.run(storm(options, checker, crowd))
    print(json.dumps(results), flush=True)
    with Replay.of(EngineConfig(model=MODEL, dtype="float32", kv_memory_gib=0.25)) as replay:
        results["answers"] = checker.judge(crowd.asked, replay, 0)
    print(json.dumps(results["answers"]))
    write("storm", about | results, part=options.part)


if __name__ == "__main__":
    main()
