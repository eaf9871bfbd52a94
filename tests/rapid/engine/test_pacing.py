"""Prefills take what a step's time allows while others decode, and all that is allowed when nobody does."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from running import VOCAB, begun, decode, done, opened, random_tokens

from rapid.engine import admission, passes
from rapid.engine import engine as engine_module
from rapid.engine import sequence as sequence_module
from rapid.engine.engine import Engine
from rapid.engine.pacing import MAX_BATCH_TOKENS, Chunk, Pacer
from rapid.engine.verify import prefill
from rapid.models.model import Model

MakeModel = Callable[..., Model]
MakeEngine = Callable[..., Engine]

BALANCED = 30_000.0
BASE_MS, MS_PER_TOKEN = 8.0, 0.05  # about an 8B model on an H100


def cost_ms(chunks: list[Chunk]) -> float:
    return BASE_MS + MS_PER_TOKEN * sum(n * (1 + (context + n / 2) / BALANCED) for n, context in chunks)


def read(pacer: Pacer, length: int, *, streaming: bool, num_decoding: int = 0) -> list[tuple[int, float]]:
    """The tokens and the milliseconds of the passes that read a prompt of ``length``."""
    passes, context = [], 0
    while context < length:
        n = min(length - context, pacer.num_tokens(num_decoding, [context], streaming=streaming) - num_decoding)
        passes.append((n, cost_ms([Chunk(n, context)])))
        pacer.observe(passes[-1][1], [Chunk(n, context)])
        context += n
    return passes


@pytest.fixture
def pacer() -> Pacer:
    made = Pacer(8192, 100.0, BALANCED)
    for _ in range(5):
        made.observe(BASE_MS, [])
    return made


def test_who_decodes_waits_for_about_the_budget_from_the_second_pass_on(pacer: Pacer) -> None:
    """Over all of a long prompt, though attention makes its last tokens five times as costly as its first."""
    passes = read(pacer, 128_000, streaming=True, num_decoding=8)
    assert passes[0][1] < 20
    assert all(99 < ms < 101 for _, ms in passes[1:-1])
    assert passes[1][0] > 4 * passes[-2][0]


def test_where_nobody_decodes_all_that_is_allowed_is_read(pacer: Pacer) -> None:
    passes = read(pacer, 128_000, streaming=False)
    assert {n for n, _ in passes[:-1]} == {8192}
    assert sum(ms for _, ms in passes) < 0.95 * sum(ms for _, ms in read(pacer, 128_000, streaming=True))


def test_what_is_learned_from_large_passes_holds_for_small_ones(pacer: Pacer) -> None:
    read(pacer, 128_000, streaming=False)
    assert all(99 < ms < 101 for _, ms in read(pacer, 32_000, streaming=True)[:-1])


def test_a_slow_pass_is_soon_forgotten_and_a_slow_device_is_learned(pacer: Pacer) -> None:
    read(pacer, 32_000, streaming=True)
    pacer.observe(10 * cost_ms([Chunk(1000, 0)]), [Chunk(1000, 0)])  # something else took the device
    times = [ms for _, ms in read(pacer, 32_000, streaming=True)]
    assert times[0] < 40 and times[6] > 90


def test_it_is_known_what_a_pass_should_take_once_such_passes_were_measured(pacer: Pacer) -> None:
    """Also one behind a longer context, or with more sequences, than any before."""
    assert Pacer(8192, 100.0, BALANCED).expected_s([], [Chunk(1, 100)]) is None
    assert pacer.expected_s([Chunk(1000, 0)], []) is None  # no prompt has been read
    assert pacer.expected_s([], [Chunk(1, 100)]) == pytest.approx(BASE_MS / 1e3)
    read(pacer, 32_000, streaming=True)
    for reading in ([Chunk(1000, 0)], [Chunk(16, 32_000)], [Chunk(8192, 100_000)]):
        assert pacer.expected_s(reading, []) == pytest.approx(cost_ms(reading) / 1e3, rel=0.01)
    many = [Chunk(1, 100_000)] * 50
    assert pacer.expected_s([], many) == pytest.approx(cost_ms(many) / 1e3, rel=0.01)


def test_prompts_are_read_even_if_decoding_takes_the_whole_budget() -> None:
    pacer = Pacer(8192, 100.0, BALANCED)
    pacer.observe(130.0, [])
    pacer.observe(140.0, [Chunk(128, 0)])
    assert pacer.num_tokens(40, [5000], streaming=True) > 40 + 16
    pacer.observe(1e6, [Chunk(16, 0)])
    assert pacer.num_tokens(40, [5000], streaming=True) == 40 + 16


def test_a_pass_without_memory_bounds_all_later_ones(pacer: Pacer) -> None:
    pacer.too_large(6000)
    assert pacer.num_tokens(0, [0], streaming=False) == pacer.max_tokens == 3000
    pacer.too_large(1)
    assert pacer.max_tokens == 1


# In the engine


class Clock:
    """Time that passes by the cost of what the model computes, and at no other time."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.passes = 1000.0, []
        monkeypatch.setattr(Model, "balanced_context", 1000.0)  # of so small a network it is a few tokens
        forward = model.forward

        def timed(entries: Any, **options: Any) -> Any:
            chunks = [Chunk(len(tokens), cache.length) for cache, tokens, num_rows in entries if not num_rows]
            ms = BASE_MS + sum(n * (1 + (context + n / 2) / model.balanced_context) for n, context in chunks)
            self.passes.append((sum(len(tokens) for _, tokens, _ in entries), ms))
            self.now += ms / 1e3
            return forward(entries, **options)

        monkeypatch.setattr(model, "forward", timed)
        fake = SimpleNamespace(monotonic=lambda: self.now, perf_counter=time.perf_counter)
        for module in (engine_module, passes, admission, sequence_module):
            monkeypatch.setattr(module, "time", fake)


@pytest.fixture
def model(tiny_model: MakeModel) -> Model:
    return tiny_model(VOCAB, window=2048)


def test_a_stream_keeps_its_pace_beside_a_prefill_and_an_idle_engine_reads_at_full_speed(
    model: Model, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(model, monkeypatch)
    running = engine(model, max_batch_tokens=512, step_budget_ms=60.0)
    alone = begun(running, random_tokens(1601, seed=1))
    done(running.submit(prefill(alone)))
    assert [n for n, _ in clock.passes] == [512, 512, 512, 64]

    stream = opened(running, random_tokens(5, seed=2))
    decode(running, stream, 5)
    clock.passes.clear()
    reading: Future[Any] = running.submit(prefill(begun(running, random_tokens(1201, seed=3))))
    while not reading.done():  # a round of the stream whenever it is asked for
        decode(running, stream, 1)
    assert sum(n for n, _ in clock.passes) >= 1200
    assert max(ms for _, ms in clock.passes) < 66

    running.close(stream)
    clock.passes.clear()
    done(running.submit(prefill(begun(running, random_tokens(1101, seed=4)))))
    assert [n for n, _ in clock.passes] == [512, 512, 76]


def test_between_two_rounds_a_stream_still_counts_but_not_for_long(
    model: Model, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a drafter on another device drafts, the target's engine has no work of the stream."""
    clock = Clock(model, monkeypatch)
    running = engine(model, max_batch_tokens=512, step_budget_ms=60.0)
    stream = opened(running, random_tokens(400, seed=2))
    decode(running, stream, 5)
    clock.passes.clear()
    done(running.submit(prefill(begun(running, random_tokens(601, seed=3)))))
    assert max(ms for _, ms in clock.passes) < 66
    clock.now += 2.0
    clock.passes.clear()
    done(running.submit(prefill(begun(running, random_tokens(601, seed=4)))))
    assert [n for n, _ in clock.passes] == [512, 88]


def test_the_device_says_how_many_tokens_a_pass_may_have(model: Model, engine: MakeEngine) -> None:
    running = engine(model)
    opened(running, random_tokens(300, seed=1))
    assert running.stats().forward_passes == -(-299 // MAX_BATCH_TOKENS["cpu"])
