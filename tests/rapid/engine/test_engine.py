"""The batching engine: scheduling never changes what comes out, and one request never harms another."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from gate import Gate
from running import (
    GREEDY,
    VOCAB,
    assert_cache_is_fresh,
    begun,
    decode,
    done,
    eventually,
    opened,
    random_tokens,
    verification,
)

from rapid.engine import engine as engine_module
from rapid.engine.engine import Engine
from rapid.engine.messages import SequenceRequest
from rapid.engine.sequence import ForwardRequest, Sequence, Task
from rapid.engine.verify import prefill
from rapid.errors import SequenceClosed
from rapid.kernels.cpu.jit import available
from rapid.models.model import Model
from rapid.sampling import sampler
from rapid.sampling.params import SamplingParams
from rapid.speculation.draft import Draft, VerifyResult, certain_draft

MakeModel = Callable[..., Model]
MakeEngine = Callable[..., Engine]


@pytest.fixture
def model(tiny_model: MakeModel) -> Model:
    return tiny_model(VOCAB)


@pytest.fixture
def gate(model: Model, gates: Callable[[Model], Gate]) -> Gate:
    return gates(model)


@pytest.mark.parametrize("budget", [1, 7, 64, 128, 1000])
def test_a_prefill_in_chunks_equals_a_whole_one(model: Model, engine: MakeEngine, budget: int) -> None:
    running = engine(model, max_batch_tokens=budget)
    prompt = random_tokens(201, seed=1)
    sequence = opened(running, prompt)
    assert sequence.cache.length == 200  # the first round feeds the last token
    assert running.stats().forward_passes == -(-200 // budget)
    assert_cache_is_fresh(sequence, model)
    assert decode(running, sequence, 8) == decode(running, opened(engine(model), prompt), 8)


def test_a_prompt_of_one_token_needs_no_prefill(model: Model, engine: MakeEngine) -> None:
    running = engine(model)
    sequence = opened(running, [5])
    assert running.stats().forward_passes == 0
    assert len(decode(running, sequence, 3)) == 3
    assert_cache_is_fresh(sequence, model)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=0.8, seed=9)])
def test_many_at_once_equal_each_alone(tiny_model: MakeModel, engine: MakeEngine, sampling: SamplingParams) -> None:
    """Requests of all lengths share passes, and get what they would have got alone."""
    model = tiny_model(VOCAB, seed=3)
    prompts = [random_tokens(n, seed=n) for n in (1, 2, 9, 30, 64, 65, 100, 129, 200, 13, 77, 150)]

    def a_round(running: Engine, i: int, sequence: Sequence, round_number: int) -> Future[VerifyResult]:
        draft = certain_draft(len(sequence.output), random_tokens((i + round_number) % 4, seed=i))
        return running.submit(verification(sequence, draft, "augmented", 5.0))

    running = engine(model, max_batch_tokens=48)
    together = [begun(running, prompt, sampling) for prompt in prompts]
    list(map(done, [running.submit(prefill(sequence)) for sequence in together]))
    for round_number in range(6):
        list(map(done, [a_round(running, i, s, round_number) for i, s in enumerate(together)]))
    lonely = engine(model, max_batch_tokens=48)
    for i, prompt in enumerate(prompts):
        alone = opened(lonely, prompt, sampling)
        for round_number in range(6):
            done(a_round(lonely, i, alone, round_number))
        assert together[i].output == alone.output


def test_closing_in_the_middle_of_a_prefill_frees_it_within_a_step(
    model: Model, engine: MakeEngine, gate: Gate
) -> None:
    running = engine(model, max_batch_tokens=10)
    doomed, other = (begun(running, random_tokens(n, seed=n), room=400 - n) for n in (201, 21))
    pages = 400 * model.layout.bytes_per_token
    reading = running.submit(prefill(doomed))
    gate.wait()
    assert running.stats().kv_bytes == 2 * pages
    gate.step()
    running.close(doomed)
    assert running.stats().num_sequences == 1
    going_on = running.submit(prefill(other))
    gate.step()  # the pass that was waiting when the sequence was closed is its last
    with pytest.raises(SequenceClosed):
        done(reading)
    gate.step()
    assert running.stats().kv_bytes == pages
    gate.open()
    assert done(going_on).elapsed_ms >= 0
    assert sum(map(sum, gate.passes)) == 10 + 10 + 20
    with pytest.raises(SequenceClosed, match=f"sequence {doomed.id} is closed"):
        running.get(doomed.id)
    assert running.get(other.id) is other
    with pytest.raises(SequenceClosed):  # and whatever is asked of it later
        done(running.submit(prefill(doomed)))


def test_room_of_a_closed_prefill_goes_to_who_waits_when_nothing_else_happens(
    model: Model, engine: MakeEngine, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rapid.engine.engine._IDLE_TURN_S", 3600.0)
    running = engine(model, kv_bytes=256 * model.layout.bytes_per_token, max_batch_tokens=10)
    doomed = begun(running, random_tokens(201, seed=1), room=20)
    reading = running.submit(prefill(doomed))
    gate.wait()
    waiting = running.open(SequenceRequest([1], 200, GREEDY))
    running.close(doomed)
    gate.open()
    with pytest.raises(SequenceClosed):
        done(reading)
    running.close(done(waiting))
    eventually(lambda: running.stats().kv_bytes == 0)


def test_a_task_that_fails_fails_alone(model: Model, engine: MakeEngine) -> None:
    running = engine(model)
    sequence, other = opened(running, random_tokens(20, seed=12)), begun(running, [1])

    def failing(before: bool) -> Task[None]:
        if before:
            raise KeyError("before its first step")
        yield ForwardRequest(other, [1, 2], 1)
        raise KeyError("after a step")

    for before in (True, False):
        with pytest.raises(KeyError):
            done(running.submit(failing(before)))
    assert len(decode(running, sequence, 2)) == 2


def test_a_forward_pass_that_fails_is_told_to_all_in_it_and_the_next_one_works(
    model: Model, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = engine(model)
    sequence, other = (opened(running, random_tokens(20, seed=13)) for _ in range(2))

    def broken(entries: Any, **_: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", broken)
        for failed in [running.submit(verification(s, Draft(0), "lossless", 0.0)) for s in (sequence, other)]:
            with pytest.raises(RuntimeError, match="out of memory"):
                done(failed)
    assert sequence.cache.length == 19  # the interrupted pass left nothing behind
    assert decode(running, sequence, 4) == decode(running, other, 4)


def test_a_cancelled_future_is_not_run(model: Model, engine: MakeEngine, gate: Gate) -> None:
    running = engine(model)
    sequences = [begun(running, prompt) for prompt in ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5])]
    first = running.submit(prefill(sequences[0]))
    gate.wait()
    second = running.submit(prefill(sequences[1]))
    assert second.cancel()
    gate.open()
    done(first)
    done(running.submit(prefill(sequences[2])))
    assert gate.passes == [[2], [4]]


def test_who_brings_work_asks_for_the_turn_himself(
    model: Model, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To wake another thread for that would cost every round as much again."""
    running, asked = engine(model), list[str]()
    sequence = begun(running, [1, 2, 3])
    soon = engine_module.soon
    monkeypatch.setattr(engine_module, "soon", lambda turn: asked.append(threading.current_thread().name) or soon(turn))
    done(running.submit(prefill(sequence)))
    assert threading.current_thread().name in asked


def test_a_sequence_nobody_uses_expires(model: Model, engine: MakeEngine) -> None:
    running = engine(model, idle_timeout=0.05)
    sequence = begun(running, [1])
    sequence.ended.result(timeout=10)
    assert running.stats().num_sequences == 0
    with pytest.raises(SequenceClosed):
        running.get(sequence.id)


def set_clock(monkeypatch: pytest.MonkeyPatch, now: Callable[[], float]) -> None:
    for module in ("engine", "passes", "admission"):
        monkeypatch.setattr(f"rapid.engine.{module}.time", SimpleNamespace(monotonic=now))


def test_a_sequence_in_use_does_not_expire(model: Model, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for it and running it both count as use."""
    later = 0.0
    set_clock(monkeypatch, lambda: time.monotonic() + later)
    running = engine(model, idle_timeout=100)
    asked, run, forgotten = (running.get(begun(running, [1, 2]).id) for _ in range(3))
    later = 80.0
    running.get(asked.id)
    done(running.submit(prefill(run)))
    later = 120.0
    forgotten.ended.result(timeout=10)
    assert running.stats().num_sequences == 2
    assert running.get(asked.id) is asked
    assert running.get(run.id) is run


def test_a_sequence_nobody_has_called_yet_expires_soon(
    model: Model, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request left at the moment it was admitted, and never learnt of it."""
    later = 0.0
    set_clock(monkeypatch, lambda: time.monotonic() + later)
    running = engine(model, idle_timeout=600)
    called, unknown = (begun(running, [1, 2]) for _ in range(2))
    done(running.submit(prefill(called), called))
    later = 11.0
    unknown.ended.result(timeout=10)
    assert running.get(called.id) is called


def test_a_sequence_that_waits_for_its_turn_does_not_expire(
    model: Model, engine: MakeEngine, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy engine a long prefill may wait for longer than any idle sequence may."""
    later = 0.0
    set_clock(monkeypatch, lambda: time.monotonic() + later)
    running = engine(model, idle_timeout=100, max_batch_tokens=10)
    short, long = (begun(running, random_tokens(n, seed=n)) for n in (21, 101))
    first = running.submit(prefill(short))
    gate.wait()
    waiting = running.submit(prefill(long))
    gate.step()
    assert gate.passes == [[10], [10]]
    later = 200.0
    gate.open()
    done(first)
    assert done(waiting).cached_tokens == 0


def test_shutdown_fails_what_is_running_and_what_comes_later(model: Model, engine: MakeEngine, gate: Gate) -> None:
    running = engine(model, max_batch_tokens=10, kv_bytes=40 * 16 * model.layout.bytes_per_token)  # 13 pages for each
    first, second, other = (begun(running, random_tokens(100, seed=seed)) for seed in (14, 15, 16))
    reading = running.submit(prefill(first))
    gate.wait()
    waiting, opening = running.submit(prefill(second)), running.open(SequenceRequest([1, 2, 3], 100, GREEDY))
    assert running.submit(prefill(other)).cancel()
    assert running.open(SequenceRequest([1, 2, 3], 10, GREEDY)).cancel()
    stopping = threading.Thread(target=running.shutdown)
    stopping.start()
    eventually(lambda: running.submit(prefill(other)).done())
    gate.open()
    stopping.join(timeout=30)
    assert not stopping.is_alive()
    late = running.submit(prefill(other)), running.open(SequenceRequest([1, 2, 3], 10, GREEDY))
    for future in (reading, waiting, opening, *late):
        with pytest.raises(SequenceClosed, match="shutting down"):
            done(future)
    assert len(gate.passes) == 1


def test_a_pass_keeps_to_its_budget_and_short_requests_go_first(model: Model, engine: MakeEngine, gate: Gate) -> None:
    """While a long prompt is read, others' short requests are in the very next pass, and it has a quarter of it."""
    running = engine(model, max_batch_tokens=16)
    long, short, shorter = (begun(running, random_tokens(n, seed=n)) for n in (101, 7, 4))
    reading = running.submit(prefill(long))
    gate.wait()
    others = [running.submit(prefill(sequence)) for sequence in (short, shorter)]
    gate.step()
    gate.open()
    list(map(done, [*others, reading]))
    assert gate.passes[:3] == [[16], [3, 6, 4], [16]]
    assert max(map(sum, gate.passes)) == 16
    assert sum(map(sum, gate.passes)) == 100 + 6 + 3


def test_rows_that_are_wanted_together_are_never_cut(model: Model, engine: MakeEngine, gate: Gate) -> None:
    """A verification needs all its rows from one pass: what leads up to them is cut, they wait for room."""
    running = engine(model, max_batch_tokens=8)
    sequence, other = (begun(running, prompt) for prompt in ([1], [1, 2]))

    def verification(num_tokens: int, num_rows: int) -> Task[tuple[int, ...]]:
        logits = yield ForwardRequest(sequence, [1] * num_tokens, num_rows)
        return tuple(logits.shape)

    blocking = running.submit(prefill(other))
    gate.wait()
    verifying = running.submit(verification(11, 6))
    gate.open()
    done(blocking)
    assert done(verifying) == (6, VOCAB)
    assert gate.passes == [[1], [5], [6]]


def test_more_rows_than_the_budget_run_alone(model: Model, engine: MakeEngine, gate: Gate) -> None:
    running = engine(model, max_batch_tokens=4)
    sequence, other = (begun(running, random_tokens(n, seed=20)) for n in (1, 11))

    def verification() -> Task[tuple[int, ...]]:
        logits = yield ForwardRequest(sequence, [1] * 9, 9)
        return tuple(logits.shape)

    reading = running.submit(prefill(other))
    gate.wait()
    verifying = running.submit(verification())
    gate.open()
    done(reading)
    assert done(verifying) == (9, VOCAB)
    assert [9] in gate.passes
    assert all(sum(sizes) <= 4 for sizes in gate.passes if sizes != [9])


@pytest.mark.skipif(not available(), reason="this machine compiles no kernels")
def test_the_kernel_of_top_p_is_compiled_while_the_engine_starts(tiny_model: MakeModel, engine: MakeEngine) -> None:
    """Else the first request that truncates waits for the compiler, and with it all requests in its pass."""
    sampler._few_kernel.cache_clear()
    engine(tiny_model(128))
    assert sampler._few_kernel.cache_info().currsize == 1


def test_stats_count_what_was_done(model: Model, engine: MakeEngine) -> None:
    running = engine(model)
    nothing = running.stats()
    assert (nothing.num_sequences, nothing.num_waiting, nothing.kv_bytes, *nothing[-4:-1]) == (0, 0, 0, 0, 0, 0)
    sequence = opened(running, random_tokens(21, seed=21), room=19)
    decode(running, sequence, 3)
    stats = running.stats()
    assert (stats.num_sequences, *stats[-4:-1]) == (1, 4, 23, 4)
    assert stats.kv_bytes == stats.kv.bytes_used == 3 * 16 * model.layout.bytes_per_token  # 40 tokens, in whole pages
    running.close(sequence)
    running.close(sequence)  # twice is once
    assert running.stats().num_sequences == 0
    eventually(lambda: running.stats().kv_bytes == 0)
    assert running.stats()[-4:-1] == (4, 23, 4)
