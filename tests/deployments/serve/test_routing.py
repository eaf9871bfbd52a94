"""Serve's router holds nothing of a request that is done; its own would, for each document."""

from __future__ import annotations

import asyncio
import gc
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.request_router import PendingRequest
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter

from deployments.serve.routing import LeaseRouter

TARGET = DeploymentID(name="Target", app_name="rapid")
ONE = ReplicaID("one", TARGET)


@dataclass(frozen=True)
class Replica:
    """One that is never busy."""

    replica_id: ReplicaID = ONE
    actor_id: str = "one"
    node_id: str = "here"
    availability_zone: str | None = None
    multiplexed_model_ids: frozenset[str] = frozenset()
    max_ongoing_requests: int = 10

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0


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
