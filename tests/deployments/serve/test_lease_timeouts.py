"""For how long what is waited for: busy replicas, replicas that are not there, and streams that are to end."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.app import build
from deployments.config import parse_config
from deployments.serve import backend as ray_backend
from deployments.serve.backend import RayBackend
from rapid.engine.messages import SequenceRequest
from rapid.errors import EngineLost, InvalidRequest, Overloaded, RapidError
from rapid.sampling.params import SamplingParams

REQUEST = SequenceRequest([1, 2, 3], 4, SamplingParams())


class Queue:
    """A deployment's handle, and the stream of a lease from it, whose first item is ``first``."""

    deployment_name, app_name = "Target", "rapid"

    def __init__(self) -> None:
        self.first: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.cancelled = asyncio.Event()
        self.lease = SimpleNamespace(remote=lambda _: self)

    def options(self, **_: Any) -> Queue:
        return self

    async def __anext__(self) -> Any:
        return await self.first

    def cancel(self) -> None:
        self.cancelled.set()


def asked(monkeypatch: pytest.MonkeyPatch, sequence: SequenceRequest, running: list[int]) -> RapidError:
    """What a lease comes to while as many replicas run as ``running`` says, each time somebody looks; then its turn."""

    async def main() -> RapidError:
        queue, loop, states = Queue(), asyncio.get_running_loop(), iter(running)

        def status() -> Any:
            if (num := next(states, None)) is None:
                loop.call_soon_threadsafe(queue.first.set_result, InvalidRequest("its turn came"))
            target = SimpleNamespace(replica_states={"RUNNING": 1 if num is None else num, "STARTING": 1})
            return SimpleNamespace(applications={"rapid": SimpleNamespace(deployments={"Target": target})})

        monkeypatch.setattr(ray_backend.serve, "status", status)
        monkeypatch.setattr(ray_backend, "_LEASE_TIMEOUT_S", 0.01)
        monkeypatch.setattr(ray_backend, "_OPTIONAL_TIMEOUT_S", 0.01)
        backend = RayBackend({"target": queue}, queue, overlap=False)  # type: ignore[dict-item, arg-type]
        with pytest.raises(RapidError) as raised:
            async with backend.lease("target", sequence):
                pass
        if not queue.first.done():
            await asyncio.wait_for(queue.cancelled.wait(), 10)  # nobody is left in the queue
        return raised.value

    return asyncio.run(main())


def test_a_request_waits_for_its_turn_as_long_as_replicas_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, REQUEST, [1, 2, 1]).message == "its turn came"
    lost = asked(monkeypatch, REQUEST, [1, 0])
    assert (type(lost), lost.message) == (EngineLost, "there is no target")


@pytest.mark.parametrize("sequence", [REQUEST.after([7]), replace(REQUEST, may_wait=False)])
def test_whoever_goes_on_elsewhere_or_may_not_wait_tries_for_some_seconds(
    monkeypatch: pytest.MonkeyPatch, sequence: SequenceRequest
) -> None:
    error = asked(monkeypatch, sequence, [1] * 1000)
    assert (type(error), error.status) == (Overloaded, 503)


def test_nothing_that_a_stream_goes_through_ends_before_it() -> None:
    application = build(parse_config({"target": {"drain_timeout_s": 700}, "drafter": {"drain_timeout_s": 800}}))
    ingress = application._bound_deployment
    through = {"Ingress": ingress, "Coordinator": ingress.init_args[1]._bound_deployment}
    waits = {name: part._deployment_config.graceful_shutdown_timeout_s for name, part in through.items()}
    assert waits == {"Ingress": 800, "Coordinator": 800}
