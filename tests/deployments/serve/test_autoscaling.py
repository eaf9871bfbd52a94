"""Replicas come and go with a real load on a cluster of two nodes, and no answer notices."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.config import AutoscalingConfig
from served import ON_RAY, complete, free_port, seconds_until_free

from deployments.app import build
from deployments.config import parse_config
from deployments.serve.engines import engines_of

pytestmark = ON_RAY

PLAIN = {"strategy": "autoregressive"}
SHORT = "\nabca b"  # too short to be a document, which would go to the replica that has read it
LEASES = 4  # that a replica is meant to have
LONG = 2000


@pytest.fixture(scope="module")
def url(tiny_folder: Path) -> Iterator[str]:
    replicas = {"min": 1, "max": 2, "target_leases": LEASES, "upscale_delay_s": 0.5, "downscale_delay_s": 1}
    engine = {"model": str(tiny_folder), "dtype": "float32", "kv_memory_gib": 0.1, "threads": 1, "num_cpus": 0.7}
    config = parse_config({"target": engine | {"replicas": replicas, "max_sequences": 16}, "colocated": True})
    # Serve's replicas report every 10 s otherwise, and the reports are averaged over 15 s.
    reporting_often = partial(AutoscalingConfig, metrics_interval_s=0.3)
    with mock.patch.multiple("deployments.app", AutoscalingConfig=reporting_often, _LOOK_BACK_S=1.0):
        application = build(config)
    port = free_port()
    one = {"num_cpus": 1}  # room for one replica and nothing more
    cluster = Cluster(initialize_head=True, head_node_args=one | {"include_dashboard": False})
    try:
        cluster.add_node(**one)
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(application, name="rapid", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        ray.shutdown()
        cluster.shutdown()


def replicas(state: str) -> int:
    return serve.status().applications["rapid"].deployments["Target"].replica_states.get(state, 0)


def leases() -> list[int]:
    """How many each engine holds."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    engines = [ray.get_actor(**actor) for actor in actors if actor["name"].startswith(engines_of("rapid"))]
    return [stats.num_sequences for stats in ray.get([engine.stats.remote() for engine in engines]) if stats]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_load_brings_a_second_replica_and_its_end_drains_one_that_still_answers(url: str) -> None:
    long, _ = complete(url, PLAIN, LONG, SHORT)
    assert (replicas("RUNNING"), leases()) == (1, [0])
    enough = threading.Event()

    def ask() -> int:
        """Short questions, one after another."""
        num = 0
        while not enough.is_set():
            text, statistics = complete(url, PLAIN, 200, SHORT)
            assert text == long[:200] and not statistics["resumed"]
            num += 1
        return num

    def read() -> str:
        text, statistics = complete(url, PLAIN, LONG, SHORT)
        assert not statistics["resumed"]
        return text

    with ThreadPoolExecutor(3 * LEASES) as pool:
        asking = [pool.submit(ask) for _ in range(2 * LEASES)]
        wait_until(lambda: replicas("RUNNING") == 2)
        enough.set()
        assert all(each.result() for each in asking)

        reading = [pool.submit(read) for _ in range(LEASES)]
        wait_until(lambda: len(held := leases()) == 2 and all(held))
        wait_until(lambda: replicas("STOPPING") == 1)
        assert len(held := leases()) == 2 and all(held)  # the one that is to go has answers under way
        assert [each.result() for each in reading] == [long] * LEASES
    wait_until(lambda: replicas("STOPPING") == 0)
    assert replicas("RUNNING") == len(leases()) == 1
    assert complete(url, PLAIN, 200, SHORT)[0] == long[:200]
    seconds_until_free(url)
