"""A drafter that goes away while nobody needs it, and comes back for whoever does: no answer fails or changes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from ray import serve
from ray.serve.config import AutoscalingConfig
from served import ON_RAY, complete, health, served

pytestmark = ON_RAY


@pytest.fixture(scope="module")
def url(tiny_folder: Path) -> Iterator[str]:
    engine = {"model": str(tiny_folder), "dtype": "float32", "kv_memory_gib": 0.1, "threads": 1}
    drafter = engine | {"replicas": {"min": 0, "max": 1, "downscale_delay_s": 3}}
    options = {"chunk_tokens": 64, "min_tokens": 128, "threshold": -1.0}
    retriever = {"long_content_tokens": 64, "options": options}
    # Serve's replicas report every 10 s otherwise, and the reports are averaged over 15 s.
    reporting_often = partial(AutoscalingConfig, metrics_interval_s=0.3)
    with (
        mock.patch.multiple("deployments.app", AutoscalingConfig=reporting_often, _LOOK_BACK_S=1.0),
        served({"target": engine, "drafter": drafter, "retriever": retriever}) as url,
    ):
        yield url


def answer(url: str, num_draft_tokens: int | str) -> tuple[str, dict[str, Any]]:
    return complete(url, {"strategy": "speculative", "num_draft_tokens": num_draft_tokens})


def num_drafters() -> int:
    states = serve.status().applications["rapid"].deployments["Drafter"].replica_states
    return sum(states.values())


def wait_until_gone() -> None:
    deadline = time.monotonic() + 60
    while num_drafters():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_drafter_goes_away_and_comes_back_for_whoever_needs_it(url: str) -> None:
    expected, statistics = answer(url, 3)  # the coordinator has asked what the drafter is, so it is there
    assert statistics["drafted"] > 0

    wait_until_gone()
    assert set(health(url)["sequences"]) == {"target"}
    assert num_drafters() == 0  # whoever watches does not wake it

    text, statistics = answer(url, "auto")
    assert text == expected
    assert statistics["drafted"] == 0

    deadline = time.monotonic() + 120
    while True:  # a fixed number waits some seconds for the drafter, and goes on without it
        text, statistics = answer(url, 3)
        assert text == expected
        if statistics["drafted"]:
            break
        assert statistics["fallback"] == "overloaded"
        assert time.monotonic() < deadline
    assert statistics["fallback"] is None
    assert set(health(url)["sequences"]) == {"target", "drafter"}

    wait_until_gone()
