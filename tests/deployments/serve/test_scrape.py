"""`GET /metrics`: the nodes' texts as one, what is said of a node that does not answer, and who may ask."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from deployments.config import parse_config
from deployments.http.api import make_api
from deployments.observability.metrics import MetricsExporter, NoExporter
from deployments.serve import scrape
from deployments.serve.scrape import Agent, ClusterMetrics, gathered, merged
from rapid.errors import RapidError

HEAD = """\
# HELP ray_rapid_requests_total HTTP requests answered
# TYPE ray_rapid_requests_total counter
ray_rapid_requests_total{replica="one",status="200"} 3.0
# HELP ray_memory_bytes Ray's own
# TYPE ray_memory_bytes gauge
ray_memory_bytes 7.0
# HELP ray_rapid_seconds How long
# TYPE ray_rapid_seconds histogram
ray_rapid_seconds_bucket{le="1.0",replica="one"} 1.0
ray_rapid_seconds_bucket{le="+Inf",replica="one"} 2.0
ray_rapid_seconds_count{replica="one"} 2.0
ray_rapid_seconds_sum{replica="one"} 2.5
"""
WORKER = """\
# HELP ray_serve_replicas Replicas
# TYPE ray_serve_replicas gauge
ray_serve_replicas{named="a\u2028b"} 1.0
# HELP ray_rapid_requests_total HTTP requests answered
# TYPE ray_rapid_requests_total counter
ray_rapid_requests_total{replica="two",status="200"} 4.0
ray_rapid_requests_total{replica="two",status="404"} 1.0
"""


def read(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """The samples of each family by name and labels, as Prometheus' own parser reads them."""
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)  # a family that is split comes twice
    return {family.name: {(s.name, *sorted(s.labels.values())): s.value for s in family.samples} for family in families}


@contextmanager
def agent(node: str, text: str) -> Iterator[Agent]:
    """A double of a node's metrics agent."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Agent(node, f"http://127.0.0.1:{server.server_port}/metrics")
        finally:
            server.shutdown()
            thread.join()


def test_a_family_of_two_nodes_is_one_family_with_the_samples_of_both() -> None:
    told = read(merged([HEAD, WORKER]))
    assert told == {
        "ray_rapid_requests": {
            ("ray_rapid_requests_total", "200", "one"): 3,
            ("ray_rapid_requests_total", "200", "two"): 4,
            ("ray_rapid_requests_total", "404", "two"): 1,
        },
        "ray_rapid_seconds": read(HEAD)["ray_rapid_seconds"],
        "ray_serve_replicas": read(WORKER)["ray_serve_replicas"],
    }
    assert merged([HEAD, WORKER]).count("# ") == 6 and merged([]) == ""


def test_a_node_that_is_gone_is_told_and_the_others_are_read() -> None:
    with socket.socket() as nobody, agent("head", HEAD) as head, agent("worker", WORKER) as worker:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        gone = Agent("gone", f"http://127.0.0.1:{nobody.getsockname()[1]}/metrics")
        text = asyncio.run(gathered([head, gone, worker], limit_s=60))
    assert text.startswith("# node gone is missing: ConnectError\n")
    assert read(text) == read(merged([HEAD, WORKER]))


def test_nodes_that_say_nothing_end_with_the_limit() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # connections are taken, and nobody answers
        mute = Agent("mute", f"http://127.0.0.1:{silent.getsockname()[1]}/metrics")
        with pytest.raises(RapidError, match=r"node mute is missing: no answer in 0\.1 s") as caught:
            asyncio.run(gathered([mute], limit_s=0.1))
    assert (caught.value.status, caught.value.code) == (503, "metrics_unavailable")


def test_living_nodes_are_asked_where_ray_exports_their_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"Alive": True, "NodeManagerAddress": "10.0.0.1", "MetricsExportPort": 8080}
    nodes = [node, {**node, "Alive": False}, {**node, "NodeManagerAddress": "fd00::1"}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert scrape._agents() == [
        Agent("10.0.0.1", "http://10.0.0.1:8080/metrics"),
        Agent("fd00::1", "http://[fd00::1]:8080/metrics"),
    ]


def test_many_who_ask_at_once_cost_one_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    num_scrapes = 0

    async def story() -> None:
        goes_on = asyncio.Event()

        async def counting() -> str:
            nonlocal num_scrapes
            num_scrapes += 1
            await goes_on.wait()
            return f"{num_scrapes}"

        monkeypatch.setattr(scrape, "_scrape", counting)
        metrics = ClusterMetrics()
        asked = [asyncio.create_task(metrics.text()) for _ in range(5)]
        await asyncio.sleep(0)
        asked[0].cancel()  # who leaves takes the answer from nobody
        goes_on.set()
        assert await asyncio.gather(*asked[1:]) == ["1"] * 4
        assert await metrics.text() == "2"

    asyncio.run(story())


class Published(NoExporter):
    async def text(self) -> str:
        return merged([HEAD])


class Unreadable(NoExporter):
    async def text(self) -> str:
        return await gathered([])


class Nothing:
    files = None


def ask(exporter: MetricsExporter | None, headers: Mapping[str, str]) -> httpx.Response:
    config = parse_config({"access": {"api_keys": ["a"]}})
    api = make_api(config, Nothing(), exporter=exporter)  # type: ignore[arg-type]

    async def get() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://x") as client:
            return await client.get("/metrics", headers=headers)

    return asyncio.run(get())


@pytest.mark.parametrize(("exporter", "text"), [(None, ""), (Published(), merged([HEAD]))])
def test_who_has_a_key_reads_the_metrics(exporter: MetricsExporter | None, text: str) -> None:
    answer = ask(exporter, {"Authorization": "Bearer a"})
    assert (answer.status_code, answer.text) == (200, text)
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert ask(exporter, {}).status_code == 401  # they are of all keys together


def test_that_no_node_answers_is_an_error_in_words() -> None:
    answer = ask(Unreadable(), {"Authorization": "Bearer a"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (503, "metrics_unavailable", "server_error")
    assert "Ray knows no node" in error["message"]
