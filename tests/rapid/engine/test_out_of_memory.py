"""A pass for which there is no memory is cut; only what cannot be cut fails, and it fails alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gate import Gate
from running import VOCAB, assert_cache_is_fresh, begun, decode, done, opened, random_tokens, verification

from rapid.engine.engine import Engine
from rapid.engine.verify import prefill
from rapid.errors import EngineLost
from rapid.kv_cache.memory import is_out_of_memory
from rapid.models.model import Model
from rapid.speculation.draft import certain_draft

MakeModel = Callable[..., Model]
MakeEngine = Callable[..., Engine]

MESSAGES = [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
]


@pytest.fixture
def model(tiny_model: MakeModel) -> Model:
    return tiny_model(VOCAB)


@pytest.fixture
def little_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Makes passes of more than ``most`` tokens fail; returns the list of all passes' tokens."""

    def make(most: int, error: Exception | None = None) -> list[int]:
        passes: list[int] = []
        forward = model.forward

        def limited(entries: Any, **options: Any) -> Any:
            passes.append(sum(len(tokens) for _, tokens, _ in entries))
            if passes[-1] > most:
                raise error or torch.OutOfMemoryError(MESSAGES[0])
            return forward(entries, **options)

        monkeypatch.setattr(model, "forward", limited)
        return passes

    return make


@pytest.mark.parametrize("message", MESSAGES)
def test_it_is_recognised_whichever_library_says_it(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))
    assert is_out_of_memory(torch.OutOfMemoryError(message))
    assert not is_out_of_memory(EngineLost(message))  # of another rank: the ranks are no longer in step


def test_other_errors_are_not_taken_for_it() -> None:
    for message in ("CUDA error: an illegal memory access was encountered", "CUBLAS_STATUS_EXECUTION_FAILED"):
        assert not is_out_of_memory(RuntimeError(message))


@pytest.mark.parametrize("message", MESSAGES[:2])
def test_a_prefill_goes_on_in_smaller_chunks(
    tiny_model: MakeModel, model: Model, engine: MakeEngine, little_memory: Callable[..., list[int]], message: str
) -> None:
    running = engine(model, max_batch_tokens=128)
    passes = little_memory(50, RuntimeError(message))
    sequence = opened(running, random_tokens(201, seed=1))
    assert passes == [128, 64, 32, 32, 32, 32, 32, 32, 8]  # a size that failed is not tried again
    assert running.stats().out_of_memory == 2
    assert_cache_is_fresh(sequence, tiny_model(VOCAB))


def test_sequences_that_do_not_fit_together_run_one_after_another(
    tiny_model: MakeModel,
    model: Model,
    engine: MakeEngine,
    gates: Callable[[Model], Gate],
    little_memory: Callable[..., list[int]],
) -> None:
    running = engine(model)
    sequences = [opened(running, random_tokens(n, seed=n)) for n in (3, 20, 40)]
    passes, gate = little_memory(5), gates(model)
    first = running.submit(verification(sequences[0], certain_draft(0, [1])))
    gate.wait()
    drafts = [certain_draft(0, [1]), certain_draft(0, [1, 2, 3])]
    rest = [running.submit(verification(s, draft)) for s, draft in zip(sequences[1:], drafts, strict=True)]
    gate.open()
    for future in (first, *rest):
        done(future)
    assert passes == [2, 6, 2, 4]
    assert running.stats().out_of_memory == 1
    whole = engine(tiny_model(VOCAB))
    for sequence in sequences:
        assert decode(running, sequence, 6)[:6] == decode(whole, opened(whole, sequence.prompt), 8)[:6]


def test_what_cannot_be_cut_fails_alone(
    model: Model, engine: MakeEngine, gates: Callable[[Model], Gate], little_memory: Callable[..., list[int]]
) -> None:
    running = engine(model)
    sequences = [opened(running, random_tokens(n, seed=n)) for n in (3, 20)]
    little_memory(4)
    gate = gates(model)
    waiting = running.submit(prefill(begun(running, random_tokens(4, seed=5))))
    gate.wait()
    large = running.submit(verification(sequences[0], certain_draft(0, [1] * 7)))
    small = running.submit(verification(sequences[1], certain_draft(0, [1])))
    gate.open()
    done(waiting)
    with pytest.raises(torch.OutOfMemoryError):
        done(large)
    assert done(small).tokens
    assert decode(running, sequences[0], 2)  # and the sequence itself lives
    assert running.stats().out_of_memory == 2
