"""Two engines on one thread: drafts are computed to their end, and what is verified is gathered."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from gate import Gate
from running import VOCAB, begun, done, eventually, opened, proposal, random_tokens, verification

from rapid.backend.local import LocalBackend
from rapid.engine import engine as engine_module
from rapid.engine import torch_thread
from rapid.engine.engine import Engine
from rapid.engine.verify import prefill
from rapid.models.model import Model
from rapid.speculation.draft import Draft, DraftLimits

MakeEngine = Callable[..., Engine]


@pytest.fixture
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(VOCAB)


def told_when_it_gathers(running: Engine, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when ``running`` waits for sequences before a pass."""
    gathering, wait = threading.Event(), running._news.wait

    def noticed(timeout: float | None = None) -> bool:
        gathering.set()
        return wait(timeout)

    monkeypatch.setattr(running._news, "wait", noticed)
    return gathering


def test_a_draft_is_computed_to_its_end_before_the_other_engine_has_its_turn(
    tiny_model: Callable[..., Model], engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"target": tiny_model(VOCAB, seed=1), "drafter": tiny_model(VOCAB, seed=2)}
    target, drafter = (engine(each) for each in models.values())
    verified, drafted = opened(target, random_tokens(20, seed=3)), opened(drafter, random_tokens(20, seed=3))
    order: list[str] = []
    verifying: list[Any] = []
    for name, each in models.items():

        def forward(*args: Any, name: str = name, of: Callable[..., Any] = each.forward, **options: Any) -> Any:
            order.append(name)
            if not verifying:  # it comes while the first draft step runs
                verifying.append(target.submit(verification(verified, Draft(0))))
                eventually(lambda: torch_thread._THREAD._work_queue.qsize() > 0)
            return of(*args, **options)

        monkeypatch.setattr(each, "forward", forward)
    done(drafter.submit(proposal(drafted, 0, [], DraftLimits(5), 8, frozenset())))
    done(verifying[0])
    assert order == ["drafter"] * 5 + ["target"]


@pytest.mark.parametrize("beside_a_drafter", [False, True])
def test_a_pass_waits_for_sequences_that_are_between_rounds(
    model: Model,
    engine: MakeEngine,
    gates: Callable[[Model], Gate],
    monkeypatch: pytest.MonkeyPatch,
    beside_a_drafter: bool,
) -> None:
    monkeypatch.setattr(engine_module, "_GATHER_S", 30.0)
    running = engine(model)
    running.gathers = beside_a_drafter
    gate = gates(model)
    gathering = told_when_it_gathers(running, monkeypatch)
    sequences = [begun(running, random_tokens(20, seed=i)) for i in (4, 5)]

    def verified(number: int, position: int) -> Future[Any]:
        return running.submit(verification(sequences[number], Draft(position)), sequences[number])

    reading = [running.submit(prefill(sequence), sequence) for sequence in sequences]
    gate.open()
    for read in reading:
        done(read)
    gathering.clear()
    first = verified(0, 0)
    assert gathering.wait(30)
    done(verified(1, 0))
    done(first)
    assert gate.passes == [[19, 19], [1, 1]]
    running.close(sequences[0])
    done(verified(1, 1))  # nobody waits for what is closed
    assert gate.passes == [[19, 19], [1, 1], [1]]


def test_a_pass_waits_for_the_first_call_of_a_sequence_just_opened(
    model: Model, engine: MakeEngine, gates: Callable[[Model], Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease is on its way to another process, and its prefill on the way back."""
    monkeypatch.setattr(engine_module, "_GATHER_S", 0.0)
    monkeypatch.setattr(engine_module, "_FIRST_CALL_S", 30.0)
    running = engine(model)
    gate = gates(model)
    gathering = told_when_it_gathers(running, monkeypatch)
    gate.open()
    early, late = (begun(running, random_tokens(20, seed=i)) for i in (4, 5))
    reading = running.submit(prefill(early), early)
    assert gathering.wait(30)
    done(running.submit(prefill(late), late))
    done(reading)
    assert gate.passes == [[19, 19]]
    done(running.submit(verification(early, Draft(0)), early))  # the other one has called
    assert gate.passes == [[19, 19], [1]]
    assert early.pause_s < 30  # from the opening to the first call is no pause


def test_nobody_waits_for_a_sequence_that_pauses_for_long(
    model: Model, engine: MakeEngine, gates: Callable[[Model], Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for a drafter, or for its reader."""
    monkeypatch.setattr(engine_module, "_GATHER_S", 30.0)
    running = engine(model)
    slow, other = (begun(running, random_tokens(20, seed=i)) for i in (4, 5))
    slow.pause_s = other.pause_s = 600.0
    for sequence in (slow, other):
        done(running.submit(prefill(sequence), sequence))
    slow.pause_s = other.pause_s = 600.0
    done(running.submit(verification(other, Draft(0)), other))
    assert other.pause_s < 600.0


def test_only_a_target_beside_a_drafter_gathers(model: Model, engine: MakeEngine) -> None:
    target, drafter = engine(model), engine(model)
    LocalBackend(target, target, lambda *_: None)  # type: ignore[arg-type, return-value]
    assert not target.gathers
    LocalBackend(target, drafter, lambda *_: None)  # type: ignore[arg-type, return-value]
    assert target.gathers and not drafter.gathers
