"""The memory of a service's processes while it works. Memory that still grows when all caches are full is a leak."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.common.clients import new_client

SAMPLE_S = 5.0


@dataclass
class Memory:
    """The resident size of the service's processes, and the KV memory that open sequences hold, over time.

    The resident size counts what a process has touched of shared memory (Ray's object store) and of files, too. Its
    private part is what a leak is in.
    """

    url: str
    process: psutil.Process
    samples: list[dict[str, Any]] = field(default_factory=list)

    async def watch(self) -> None:
        started = time.perf_counter()
        async with new_client() as http:
            while True:
                resident, private = await asyncio.to_thread(self._sizes)
                total = round(sum(resident.values()), 1)
                with suppress(httpx.HTTPError, KeyError, ValueError):
                    health = (await http.get(f"{self.url}/health")).json()
                    held = sum(health["kv_bytes"].values())
                    sample = {"s": round(time.perf_counter() - started, 1), "rss_mib": total}
                    sample["kv_mib"] = round(held / 2**20, 1)
                    by_process = {"rss_mib_by_process": resident, "private_mib_by_process": private}
                    self.samples.append(sample | by_process)
                await asyncio.sleep(SAMPLE_S)

    def _sizes(self) -> tuple[dict[str, float], dict[str, float]]:
        """MiB by process: (resident, private)."""
        resident: dict[str, float] = {}
        private: dict[str, float] = {}
        for process in [self.process, *self.process.children(recursive=True)]:
            with suppress(psutil.Error):
                name, memory = f"{process_name(process)} {process.pid}", process.memory_info()
                resident[name] = round(memory.rss / 2**20, 1)
                private[name] = round((memory.rss - memory.shared) / 2**20, 1)
        return resident, private

    def report(self) -> dict[str, Any]:
        """The later thirds beside the first: memory that still grows when the KV memory is full is a leak."""
        settled = self.samples[len(self.samples) // 3 :]
        names = {name for sample in settled for name in sample["rss_mib_by_process"]}
        of = {name: _growth(settled, lambda s, name=name: s["rss_mib_by_process"].get(name, 0.0)) for name in names}
        return {
            "rss_mib_by_thirds": _thirds([sample["rss_mib"] for sample in self.samples]),
            "rss_mib_a_minute_settled": _growth(settled, lambda s: s["rss_mib"]),
            "rss_mib_a_minute_by_process": dict(sorted(of.items(), key=lambda item: -abs(item[1]))),
            "samples": self.samples,
        }


def process_name(process: psutil.Process) -> str:
    """Ray's title of an actor's process (without its current method), or the name of a program or a script."""
    command = process.cmdline()
    if command and command[0].startswith("ray::"):
        return command[0].split(".")[0]
    return next((Path(word).name for word in command if word.endswith(".py")), process.name())


def _thirds(values: Sequence[float]) -> list[float]:
    parts = [values[i * len(values) // 3 : (i + 1) * len(values) // 3] for i in range(3)]
    return [round(statistics.mean(part), 1) for part in parts if part]


def _growth(samples: Sequence[dict[str, Any]], of: Callable[[dict[str, Any]], float]) -> float:
    """MiB a minute, by least squares."""
    return round(statistics.linear_regression([s["s"] / 60 for s in samples], [of(s) for s in samples]).slope, 2)
