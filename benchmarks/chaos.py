"""Processes killed at random, a node removed, replicas scaled up and down, all under load on a cluster of three nodes.

The nodes are Ray's own test cluster: real raylets and real processes on this machine. Answers are greedy in float32, so
each must equal, letter for letter, the answer of an undisturbed service; any difference is a lost, doubled or changed
token. The head holds the processes that cannot be replaced (HTTP proxy, ingress, coordinator); engines run on the other
nodes.
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
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster

from benchmarks.common.results import DATA, write
from deployments.app import build
from deployments.config import parse_config

MODEL = "smollm2-135m-instruct"
PORT = 8123
URL = f"http://127.0.0.1:{PORT}"
NODE_CPUS = 4
ENGINE_CPUS = 1.0  # more than the head has left, so that engines run on the other nodes
WHATEVER_LASTS = 600.0  # seconds


def application(*, targets: dict[str, Any], ranks: int) -> Any:
    engine = {"model": MODEL, "dtype": "float32", "kv_memory_gib": 0.25, "max_sequences": 8}
    engine |= {"tensor_parallel": ranks, "num_cpus": ENGINE_CPUS / ranks}
    config = {
        "target": engine | {"replicas": targets},
        "drafter": engine,
        "speculation": {"num_draft_tokens": 2},
        "retriever": {"long_content_tokens": 128, "options": {"chunk_tokens": 64, "min_tokens": 128, "threshold": 0.1}},
    }
    return build(parse_config(config))


@contextmanager
def service(*, num_workers: int, targets: dict[str, Any], ranks: int) -> Iterator[Cluster]:
    """The application on a head and worker nodes; ready when it yields."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": PORT})
        app = serve.RunTarget(application(targets=targets, ranks=ranks), name="rapid", route_prefix="/")
        # The cluster has only the head now, so Ray places everything but the engines on it.
        serve.run_many([app], wait_for_applications_running=False, wait_for_ingress_deployment_creation=True)
        eventually(lambda: replicas("Ingress") + replicas("Coordinator", "STARTING") + replicas("Coordinator") >= 2)
        for _ in range(num_workers):
            cluster.add_node(num_cpus=NODE_CPUS)
        eventually(lambda: serve.status().applications["rapid"].status == "RUNNING")
        yield cluster
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def replicas(deployment: str, state: str = "RUNNING") -> int:
    found = serve.status().applications["rapid"].deployments.get(deployment)
    return found.replica_states.get(state, 0) if found else 0  # type: ignore[call-overload]


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WHATEVER_LASTS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not in {WHATEVER_LASTS} s: {serve.status()}")
        time.sleep(0.2)


@dataclass
class Load:
    """Clients that ask the same questions over and over, and compare each answer with the undisturbed one."""

    new_tokens: int
    expected: dict[int, str] = field(default_factory=dict)
    completed: int = 0
    wrong: list[dict[str, str]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    resuming_ms: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)
    drafters_lost: int = 0
    stopping: bool = False

    def prompt(self, index: int) -> str:
        text = (DATA / "moby-dick.txt").read_text(encoding="utf-8")[30_000 + 40_000 * index :][:1600]
        return f"{text}\n\nWho is speaking, and what does he want?"

    async def ask(self, client: httpx.AsyncClient, index: int) -> str:
        """Streams one answer, and records the longest time without a token."""
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": self.prompt(index)}],
            "max_tokens": self.new_tokens,
            "temperature": 0,
            "stream": True,
        }
        text, last, longest = "", None, 0.0
        async with client.stream("POST", f"{URL}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    data = json.loads(line[6:])
                    if "error" in data:
                        raise RuntimeError(data["error"]["message"])
                    now = time.monotonic()
                    longest, last = max(longest, now - (last or now)), now
                    text += "".join(choice["delta"].get("content") or "" for choice in data["choices"])
                    if "rapid" in data:
                        self._note(data["rapid"], longest)
        return text

    def _note(self, statistics_: dict[str, Any], longest: float) -> None:
        self.gaps_s.append(longest)
        self.cached_tokens.append(statistics_["cached_tokens"])
        self.drafters_lost += statistics_["drafters_lost"]
        if statistics_["resumed"]:
            self.resuming_ms.append(statistics_["timings_ms"]["resuming"])

    async def client(self, number: int) -> None:
        async with httpx.AsyncClient(timeout=WHATEVER_LASTS) as client:
            index = number
            while not self.stopping:
                index = (index + 1) % len(self.expected)
                try:
                    text = await self.ask(client, index)
                except (RuntimeError, httpx.HTTPError) as error:
                    self.failed.append(f"{type(error).__name__}: {error}")
                    print(f"  FAILED {self.failed[-1]}", flush=True)
                    continue
                self.completed += 1
                if text != self.expected[index]:
                    self.wrong.append({"got": text, "expected": self.expected[index]})
                    print(f"  WRONG {self.wrong[-1]}", flush=True)

    @asynccontextmanager
    async def running(self, num_clients: int, num_questions: int) -> AsyncIterator[None]:
        """Asks every question once without disturbance, and then all of them until the block ends."""
        async with httpx.AsyncClient(timeout=WHATEVER_LASTS) as client:
            for index in range(num_questions):
                self.expected[index] = await self.ask(client, index)
        self.resuming_ms, self.gaps_s = [], []
        async with asyncio.TaskGroup() as group:
            for number in range(num_clients):
                group.create_task(self.client(number))
            try:
                yield
            finally:
                self.stopping = True

    def report(self) -> dict[str, Any]:
        """The results so far; also printed."""
        resumed = sorted(self.resuming_ms)
        row = {
            "streams_completed": self.completed,
            "streams_failed": len(self.failed),
            "streams_with_other_text": len(self.wrong),
            "streams_resumed": len(resumed),
            "drafters_lost": self.drafters_lost,
            "resume_ms_median": round(statistics.median(resumed)) if resumed else None,
            "resume_ms_worst": round(resumed[-1]) if resumed else None,
            "longest_silence_s_worst": round(max(self.gaps_s, default=0.0), 1),
            "errors": self.failed,
        }
        print(json.dumps(row), flush=True)
        return row


def processes(*titles: str) -> list[psutil.Process]:
    """Processes of this command's own cluster, by the titles that Ray gives them."""
    family = psutil.Process().children(recursive=True)
    found = []
    for process in family:
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if any(title.startswith(f"ray::{wanted}") for wanted in titles):
            found.append(process)
    return found


async def killings(num_kills: int, clients: int, pause_s: float, seed: int) -> dict[str, Any]:
    """Two targets and a drafter, each of three ranks; one process after another is killed with SIGKILL."""
    kinds = {
        "engine": ("EngineActor",),  # of a target or of the drafter
        "rank": ("RankActor",),
        "target replica": ("ServeReplica:rapid:Target",),
        "drafter replica": ("ServeReplica:rapid:Drafter",),
        "retriever": ("ServeReplica:rapid:Retriever",),
    }
    chance, load, killed = random.Random(seed), Load(new_tokens=48), Counter[str]()
    async with load.running(clients, num_questions=6):
        while killed.total() < num_kills:
            await asyncio.sleep(chance.uniform(0.3, 1.7) * pause_s)
            kind = chance.choice(list(kinds))
            candidates = processes(*kinds[kind])
            if candidates:
                os.kill(chance.choice(candidates).pid, signal.SIGKILL)
                killed[kind] += 1
                print(f"  killed {killed.total()}: {kind}; {load.completed} streams done", flush=True)
    return {"kills": dict(killed)} | load.report()


async def node_removal(cluster: Cluster, clients: int) -> dict[str, Any]:
    """Removes the node with most of the engines without a warning, and adds an empty one later."""
    routed = Load(new_tokens=8)
    async with httpx.AsyncClient(timeout=WHATEVER_LASTS) as client:
        for index in [*range(4)] * 4:
            await routed.ask(client, index)
    found = [cached > 0 for cached in routed.cached_tokens[4:]]  # a random choice of two finds half of them
    print(f"  {sum(found)} of {len(found)} repeated documents met the target that had read them", flush=True)
    load = Load(new_tokens=48)
    async with load.running(clients, num_questions=4):
        await asyncio.sleep(5)
        groups = ray.util.placement_group_table().values()
        held = Counter(node for group in groups for node in group["bundles_to_node_id"].values())
        cluster.remove_node(max(cluster.worker_nodes, key=lambda node: held[node.node_id]), allow_graceful=False)
        print("  a node is gone", flush=True)
        await asyncio.sleep(10)
        cluster.add_node(num_cpus=NODE_CPUS)
        before = load.completed
        while load.completed < before + 2 * clients:
            await asyncio.sleep(0.5)
        await asyncio.to_thread(eventually, lambda: replicas("Target") == 2)
    return {"repeated_documents": len(found), "met_their_reader": sum(found)} | load.report()


async def scaling(clients: int) -> dict[str, Any]:
    """One target becomes three while many clients ask, and one again when few do."""
    seen: list[tuple[float, int]] = []
    load, started = Load(new_tokens=32), time.monotonic()

    def note() -> int:
        seen.append((round(time.monotonic() - started, 1), replicas("Target")))
        return seen[-1][1]

    async with load.running(clients, num_questions=6):
        await asyncio.to_thread(eventually, lambda: note() == 3)
        print(f"  three replicas after {seen[-1][0]} s", flush=True)
    few = Load(new_tokens=32, expected=load.expected)
    async with few.running(1, num_questions=6):
        await asyncio.to_thread(eventually, lambda: note() == 1)
        print(f"  one replica after {seen[-1][0]} s", flush=True)
    changes = [now for before, now in zip([(0.0, 0), *seen], seen, strict=False) if before[1] != now[1]]
    return {"replicas_at_s": changes, "many": load.report(), "few": few.report()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--pause", type=float, default=6.0, help="seconds between two kills, on average")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=("kills", "node", "scaling"))
    options = parser.parse_args()
    results: dict[str, Any] = {}
    if options.only in (None, "kills"):
        with service(num_workers=2, targets={"min": 2, "max": 2}, ranks=3):
            results["kills"] = asyncio.run(killings(options.kills, options.clients, options.pause, options.seed))
    if options.only in (None, "node"):
        with service(num_workers=2, targets={"min": 2, "max": 2}, ranks=1) as cluster:
            results["node"] = asyncio.run(node_removal(cluster, options.clients))
    if options.only in (None, "scaling"):
        scaled = {"min": 1, "max": 3, "target_leases": 2, "upscale_delay_s": 2, "downscale_delay_s": 5}
        with service(num_workers=2, targets=scaled, ranks=1):
            results["scaling"] = asyncio.run(scaling(6))
    write("chaos", results, part=options.only or "")


if __name__ == "__main__":
    main()
