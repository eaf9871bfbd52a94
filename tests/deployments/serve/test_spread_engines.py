"""An engine whose layers are spread over several GPUs: what its configuration may say, where Ray puts it, its plan."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.placement import REPLICA_CPUS
from deployments.app import _engine
from deployments.cli.plan import Demand, as_object, make_report
from deployments.config import ConfigError, parse_config
from deployments.engine_config import EngineConfig

LLAMA = {"model": "meta-llama/Llama-3.1-8B-Instruct"}
SPREAD = {"model": "meta-llama/Llama-3.1-70B", "device_map": "auto", "num_gpus": 3}
DEMAND = Demand(context=8000, acceptance=0.7, new_tokens=256)


def planned(target: dict[str, Any]) -> dict[str, Any]:
    return as_object(make_report(parse_config({"target": target, "drafter": LLAMA}), "h100", DEMAND))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"device_map": "balanced"}, r"target\.device_map: Input should be 'auto'"),
        ({"device_map": "auto", "tensor_parallel": 2}, "set one of them"),
        ({"device_map": "auto", "device": "cuda:1"}, "leave device at auto, got cuda:1"),
        ({"device_map": "auto", "num_gpus": 0.5}, r"whole GPUs, got 0\.5"),
    ],
)
def test_one_process_with_gpus_of_its_own_is_all_it_goes_with(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config({"target": wrong})
    assert EngineConfig().device_map is None


def test_its_gpus_are_one_bundle() -> None:
    """For its one process; tensor_parallel's are one for each rank."""
    ranks = {"tensor_parallel": 2, "num_gpus": 1, "num_cpus": 1}
    config = parse_config({"target": {"device_map": "auto", "num_gpus": 2, "num_cpus": 1}, "drafter": ranks})
    bundles = {}
    for name, engine in (("Target", config.target), ("Drafter", config.drafter)):
        bundles[name] = _engine(name, engine, drafts=True)._bound_deployment._replica_config.placement_group_bundles
    replica = {"CPU": REPLICA_CPUS}
    assert bundles["Target"] == [replica, {"CPU": 1, "GPU": 2}]
    assert bundles["Drafter"] == [replica, {"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}]
    assert config.overlaps  # each has GPUs of its own


def test_a_plan_has_the_memory_of_all_its_gpus_and_the_speed_of_one() -> None:
    made = planned(SPREAD)
    target = made["models"]["target"]
    assert target["gpus"] == 3
    assert target["weight_bytes_per_gpu"] == pytest.approx(141.1e9 / 3, rel=1e-3)
    ranks = planned(SPREAD | {"device_map": None, "tensor_parallel": 4, "num_gpus": 1})
    assert made["ways"]["plain"]["verify_s"] > 2.5 * ranks["ways"]["plain"]["verify_s"]
    assert made["ways"]["in turn"]["fleet"]["gpus"] == 3 + 1


def test_weights_without_room_say_how_many_gpus_would_do() -> None:
    with pytest.raises(ConfigError, match="num_gpus must be at least 2"):
        planned(SPREAD | {"num_gpus": 1})


def test_given_memory_for_keys_and_values_is_shared_by_its_gpus() -> None:
    tokens = DEMAND.context + DEMAND.new_tokens
    assert planned(SPREAD | {"kv_memory_gib": 12})["models"]["target"]["sequences_that_fit"] == int(
        (12 * 2**30 / 3) // (27 * 2 * 8 * 128 * 2 * tokens)
    )
