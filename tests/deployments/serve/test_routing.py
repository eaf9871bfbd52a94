"""The router holds nothing of a request that is done, as Serve's would, and goes around replicas that hang."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.request_router import PendingRequest
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.config import RequestRouterConfig

from deployments.serve import avoided
from deployments.serve.routing import LeaseRouter

TARGET = DeploymentID(name="Target", app_name="rapid")
ONE = ReplicaID("one", TARGET)


@dataclass(frozen=True)
class Replica:
    """One that has room, and ``num_waiting`` requests."""

    replica_id: ReplicaID = ONE
    actor_id: str = "one"
    node_id: str = "here"
    availability_zone: str | None = None
    multiplexed_model_ids: frozenset[str] = frozenset()
    max_ongoing_requests: int = 10
    num_waiting: int = 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.num_waiting


class Prompt:
    """What a request brings with it."""


async def asked(router: Any, document: str, *, is_given_up: bool) -> weakref.ref[Prompt]:
    metadata = RequestMetadata(f"of {document}", f"about {document}", multiplexed_model_id=document)
    prompt = Prompt()
    routed = asyncio.create_task(router._choose_replica_for_request(PendingRequest([prompt], {}, metadata)))
    if is_given_up:
        await asyncio.sleep(0)
        routed.cancel()
    await asyncio.gather(routed, return_exceptions=True)
    return weakref.ref(prompt)


async def left_of(kind: Any, *, is_given_up: bool) -> int:
    """Prompts that ``kind`` holds after fifty documents."""
    router = kind(deployment_id=TARGET, handle_source=DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=False)
    router.update_replicas([Replica()])
    prompts = [await asked(router, f"document {i}", is_given_up=is_given_up) for i in range(50)]
    gc.collect()
    return sum(prompt() is not None for prompt in prompts)


@pytest.mark.parametrize("is_given_up", [False, True])
def test_a_request_that_is_done_is_let_go(is_given_up: bool) -> None:
    assert asyncio.run(left_of(LeaseRouter, is_given_up=is_given_up)) <= 1


def test_serves_own_router_would_keep_it() -> None:
    """When this fails, Serve has learned it, and `deployments.serve.routing` can go."""
    assert asyncio.run(left_of(PowerOfTwoChoicesRequestRouter, is_given_up=False)) == 50


@pytest.fixture
def nothing_avoided() -> Iterator[None]:
    yield
    avoided._avoided.clear()


def as_serve_takes_it(kind: type) -> Any:
    """Serve copies a router's module by value, so that what stands there is not shared with the process."""
    return RequestRouterConfig(request_router_class=kind).get_request_router_class()


def chosen(replicas: list[Replica], document: str) -> set[str]:
    """The replicas that get ten requests, one after another."""

    async def main() -> set[str]:
        router: Any = as_serve_takes_it(LeaseRouter)(
            deployment_id=TARGET, handle_source=DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=False
        )
        router.update_replicas(replicas)
        found = set()
        for i in range(10):
            metadata = RequestMetadata(f"{i}", f"internal {i}", multiplexed_model_id=document)
            replica = await asyncio.wait_for(router._choose_replica_for_request(PendingRequest([], {}, metadata)), 10)
            found.add(replica.replica_id.unique_id)
        return found

    return asyncio.run(main())


@pytest.mark.usefixtures("nothing_avoided")
@pytest.mark.parametrize("document", ["", "read by the one that hangs"])
def test_what_hangs_is_not_leased_again_though_it_is_the_least_busy_and_has_read_the_document(document: str) -> None:
    hangs = Replica(multiplexed_model_ids=frozenset({document}))
    others = [Replica(ReplicaID(name, TARGET), name, num_waiting=3) for name in ("two", "three")]
    assert chosen([hangs, others[0]], document) == {"one"}
    avoided.avoid("one")
    assert chosen([hangs, others[0]], document) == {"two"}
    assert chosen([hangs, *others], document) <= {"two", "three"}
    assert chosen([hangs], document) == {"one"}  # nothing else is there
    avoided.trust("one")
    assert chosen([hangs, others[0]], document) == {"one"}


@pytest.mark.usefixtures("nothing_avoided")
def test_a_replica_is_avoided_for_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    avoided.avoid("one")
    now += avoided.AVOID_S - 0.1
    assert avoided.is_avoided("one")
    now += 0.2
    assert not avoided.is_avoided("one")
    avoided.avoid("two")
    assert list(avoided._avoided) == ["two"]
