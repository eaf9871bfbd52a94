"""The metrics of all nodes as one text: Ray exports each node's on a port of that node.

The form is Prometheus' (https://prometheus.io/docs/instrumenting/exposition_formats): the `# HELP` and `# TYPE` lines
of a family, and its samples behind them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import NamedTuple

import httpx
import ray

from deployments.serve.ray_errors import understood
from rapid.errors import RapidError

_KEPT = ("ray_rapid_", "ray_serve_")  # families whose names begin so, without those of Ray
_NODES_S, _AGENT_S = 2.0, 4.0  # to name the nodes, and for the answers of all, which are asked at once


class Agent(NamedTuple):
    """What exports the metrics of one node."""

    node: str
    url: str


class ClusterMetrics:
    """The metrics of the cluster that this process belongs to."""

    def __init__(self) -> None:
        self._scrape: asyncio.Task[str] | None = None

    async def text(self) -> str:
        """Who asks while the agents are being asked gets the same answer: many askers cost as much as one.

        Raises:
            RapidError: no agent answered (503).
        """
        if self._scrape is None or self._scrape.done():
            self._scrape = asyncio.create_task(_scrape())
        return await asyncio.shield(self._scrape)


async def _scrape() -> str:
    with understood("Ray's list of nodes", _unavailable):
        async with asyncio.timeout(_NODES_S):
            agents = await asyncio.to_thread(_agents)
    return await gathered(agents)


def _agents() -> list[Agent]:
    places = [(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in ray.nodes() if node["Alive"]]
    return [Agent(host, f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics") for host, port in places]


async def gathered(agents: Iterable[Agent], limit_s: float = _AGENT_S) -> str:
    """The metrics of all ``agents``. A comment names each that did not answer in ``limit_s``.

    Raises:
        RapidError: none did (503).
    """
    texts: list[str] = []
    missing: list[str] = []

    async def ask(agent: Agent) -> None:
        try:
            async with asyncio.timeout(limit_s):
                texts.append((await client.get(agent.url)).raise_for_status().text)
        except (TimeoutError, httpx.HTTPError) as error:
            why = f"no answer in {limit_s:g} s" if isinstance(error, TimeoutError) else type(error).__name__
            missing.append(f"node {agent.node} is missing: {why}")

    # The environment may name a proxy, which would not reach the nodes.
    async with httpx.AsyncClient(trust_env=False, timeout=limit_s) as client:
        await asyncio.gather(*map(ask, agents))
    if not texts:
        raise _unavailable("; ".join(sorted(missing)) or "Ray knows no node")
    whole = await asyncio.to_thread(merged, texts)
    return "".join(f"# {words}\n" for words in sorted(missing)) + whole


def merged(texts: Iterable[str]) -> str:
    """The families of all ``texts`` that are kept, each with one HELP and one TYPE, and the samples of all nodes."""
    families: dict[str, tuple[dict[str, str], list[str]]] = {}
    for text in texts:
        samples: list[str] | None = None
        for line in text.split("\n"):  # a label may hold what `splitlines` takes for the end of a line
            if line.startswith(("# HELP ", "# TYPE ")):
                _, kind, name, *_ = line.split(" ", 3)
                samples = None
                if name.startswith(_KEPT):
                    told, samples = families.setdefault(name, ({}, []))
                    told.setdefault(kind, line)
            elif samples is not None and line and not line.startswith("#"):
                samples.append(line)
    return "".join(f"{line}\n" for told, samples in families.values() for line in (*told.values(), *samples))


def _unavailable(why: str) -> RapidError:
    return RapidError(f"no metrics can be read: {why}", code="metrics_unavailable", status=503)
