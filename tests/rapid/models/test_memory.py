"""On CUDA keys and values get a share of what the largest pass leaves, which is measured."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rapid.kernels.cuda.attention import PagedAttention, gathered_sdpa
from rapid.kv_cache import memory as kv_memory
from rapid.kv_cache.memory import FREE_MEMORY_SHARE
from rapid.models import memory
from rapid.models.memory import largest_pass_bytes, measured_kv_budget
from rapid.models.model import Model

WINDOW = 512


class Device:
    """Memory that a pass takes by the token, and that stays reserved until the cache is emptied."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch, *, room: int) -> None:
        self.passes: list[tuple[int, int]] = []
        self.reserved, self.peak = 500, 9_999
        forward = model.forward

        def measured(entries: Any, **options: Any) -> Any:
            ((cache, tokens, _),) = entries
            self.passes.append((cache.length, len(tokens)))
            if len(tokens) > room:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            self.reserved += 10 * len(tokens)
            self.peak = max(self.peak, self.reserved)
            return forward(entries, **options)

        def reset(device: torch.device) -> None:
            self.peak = self.reserved

        def empty() -> None:
            self.reserved = 100

        monkeypatch.setattr(model, "forward", measured)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
        monkeypatch.setattr(torch.cuda, "empty_cache", empty)


@pytest.fixture
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(attention=PagedAttention(gathered_sdpa, page_size=16), window=WINDOW)


def test_the_largest_pass_is_measured_at_the_end_of_the_window(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its attention needs the most; and without the memory of so long a sequence."""
    device = Device(model, monkeypatch, room=WINDOW)
    assert largest_pass_bytes(model, 100) == {torch.device("cpu"): 1000}
    assert device.passes == [(WINDOW - 100, 100)]
    assert device.reserved == 100  # what it took is free again
    assert largest_pass_bytes(model, 8192) == {torch.device("cpu"): 10 * WINDOW}


def test_a_pass_for_which_there_is_no_memory_is_measured_smaller(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(model, monkeypatch, room=120)
    assert largest_pass_bytes(model, 400) == {torch.device("cpu"): 1000}
    assert [n for _, n in device.passes] == [400, 200, 100]


def test_other_errors_are_raised(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    Device(model, monkeypatch, room=0)
    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        largest_pass_bytes(model, 100)


def test_the_budget_is_a_share_of_what_passes_and_graphs_leave(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"max_batch_tokens": 100, "graph_bytes": 2000}
    monkeypatch.setattr(kv_memory, "free_memory", lambda device: 10_000)
    assert measured_kv_budget(model, share=FREE_MEMORY_SHARE, **how) == 3000  # a CPU, as ever
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(memory, "largest_pass_bytes", lambda model, num_tokens: {gpu: 10 * num_tokens})
    object.__setattr__(model.layout, "devices", (gpu, gpu))
    assert measured_kv_budget(model, share=0.9, **how) == int(0.9 * (10_000 - 1000 - 2000))
    assert measured_kv_budget(model, share=0.9, max_batch_tokens=100, graph_bytes=10**6) == 0
