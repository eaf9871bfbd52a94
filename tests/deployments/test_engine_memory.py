"""An engine gets the memory, the passes and the graphs that its configuration says."""

from pathlib import Path
from typing import Any

import pytest

from deployments import builders
from deployments.engine_config import EngineConfig


def test_an_engine_takes_most_of_a_gpu_that_it_has_for_itself() -> None:
    assert EngineConfig(num_gpus=1).kv_share == EngineConfig(num_gpus=2).kv_share == 0.9
    assert EngineConfig().kv_share == EngineConfig(num_gpus=0.5).kv_share == 0.3
    assert EngineConfig(num_gpus=1, kv_memory_share=0.5).kv_share == 0.5


def test_how_many_tokens_a_pass_has_depends_on_the_device_unless_it_is_said() -> None:
    assert (EngineConfig().batch_tokens("cpu"), EngineConfig().batch_tokens("cuda")) == (128, 8192)
    assert EngineConfig(max_batch_tokens=7).batch_tokens("cuda") == 7


@pytest.mark.parametrize("kv_memory_gib", [None, 0.25])
def test_every_field_reaches_the_engine(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, kv_memory_gib: float | None
) -> None:
    made: dict[str, Any] = {}

    def budget(model: object, **how: Any) -> int:
        made["measured"] = how
        return 12345

    monkeypatch.setattr(builders, "measured_kv_budget", budget)
    monkeypatch.setattr(builders, "Engine", lambda model, **how: made.update(how))
    fields = {"kv_memory_share": 0.4, "step_budget_ms": 50, "graph_seconds": 5, "graph_memory_gib": 0.5}
    config = EngineConfig(model=str(tiny_folder), device="cpu", threads=1, kv_memory_gib=kv_memory_gib, **fields)
    builders.build_engine(config)
    measured = {"share": 0.4, "max_batch_tokens": 128, "graph_bytes": 2**29}
    assert made.get("measured") == (None if kv_memory_gib else measured)
    assert made["kv_bytes"] == (2**28 if kv_memory_gib else 12345)
    assert (made["max_batch_tokens"], made["step_budget_ms"]) == (128, 50)
    assert (made["graphs"].seconds, made["graphs"].bytes) == (5, 2**29)
