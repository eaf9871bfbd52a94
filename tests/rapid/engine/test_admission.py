"""Who gets in when, and what sequences share: room is given in order, and no token is computed twice."""

from collections.abc import Callable

import pytest
import torch
from gate import Gate
from running import (
    GREEDY,
    assert_cache_is_fresh,
    begun,
    contents,
    decode,
    done,
    eventually,
    logits_after,
    opened,
    random_tokens,
    verification,
)

from rapid.engine.engine import Engine
from rapid.engine.messages import SequenceRequest
from rapid.engine.verify import prefill
from rapid.errors import InvalidRequest, Overloaded, SequenceClosed
from rapid.models.model import Model
from rapid.speculation.draft import certain_draft

MakeEngine = Callable[..., Engine]
PAGE = 16


@pytest.fixture
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model()


@pytest.fixture
def four_pages(model: Model, engine: MakeEngine) -> Engine:
    """An engine with room for 64 tokens, where two may wait."""
    return engine(model, kv_bytes=4 * PAGE * model.layout.bytes_per_token, max_queued=2)


# Room


def test_who_waits_gets_in_in_order(four_pages: Engine) -> None:
    """Nobody small slips past somebody large, who would otherwise starve."""
    first = begun(four_pages, [1], room=40)  # three pages
    large, small = (four_pages.open(SequenceRequest([1], room, GREEDY)) for room in (60, 4))
    eventually(lambda: four_pages.stats().num_waiting == 2)
    four_pages.get(first.id)
    assert not small.done()
    four_pages.close(first)
    sequence = done(large)
    assert not small.done()
    assert four_pages.stats().num_waiting == 1
    four_pages.close(sequence)
    done(small)
    assert four_pages.stats().num_waiting == 0


def test_a_full_queue_is_answered_429(four_pages: Engine) -> None:
    begun(four_pages, [1], room=60)
    waiting = [four_pages.open(SequenceRequest([1], 10, GREEDY)) for _ in range(2)]
    with pytest.raises(Overloaded) as caught:
        done(four_pages.open(SequenceRequest([1], 10, GREEDY)))
    assert caught.value.status == 429
    assert not any(future.done() for future in waiting)
    assert waiting[0].cancel()  # whoever gives up makes room in the queue
    eventually(lambda: four_pages.stats().num_waiting == 1)
    assert not four_pages.open(SequenceRequest([1], 10, GREEDY)).done()


def test_where_nobody_may_wait_whoever_fits_gets_in(model: Model, engine: MakeEngine) -> None:
    running = engine(model, max_queued=0)
    assert done(running.open(SequenceRequest([1], 10, GREEDY))).prompt == [1]


def test_who_may_not_wait_is_told_at_once(four_pages: Engine) -> None:
    """Also when there is room, and others who came before wait for more of it."""
    begun(four_pages, [1], room=40)
    with pytest.raises(Overloaded) as caught:
        done(four_pages.open(SequenceRequest([1], 20, GREEDY, may_wait=False)))
    assert caught.value.status == 503
    done(four_pages.open(SequenceRequest([1], 10, GREEDY, may_wait=False)))
    waiting = four_pages.open(SequenceRequest([1], 60, GREEDY))
    eventually(lambda: four_pages.stats().num_waiting == 1)
    with pytest.raises(Overloaded):
        done(four_pages.open(SequenceRequest([1], 10, GREEDY, may_wait=False)))
    assert not waiting.done()


def test_what_never_fits_is_refused(four_pages: Engine) -> None:
    with pytest.raises(InvalidRequest, match=r"65 tokens .* raise kv_memory") as caught:
        four_pages.open(SequenceRequest([1] * 5, 60, GREEDY))
    assert caught.value.code == "kv_memory_exceeded"
    begun(four_pages, [1] * 4, room=60)


def test_closing_gives_the_room_back(four_pages: Engine) -> None:
    for _ in range(5):
        sequence = opened(four_pages, random_tokens(40, seed=1), room=20)
        assert four_pages.stats().kv_bytes == four_pages.stats().kv.bytes_total
        four_pages.close(sequence)
    eventually(lambda: four_pages.stats().kv_bytes == 0)
    assert four_pages.stats().kv.bytes_cached == 2 * PAGE * four_pages.model.layout.bytes_per_token


def test_a_closed_sequence_s_room_is_not_lost_when_its_opening_was_cancelled(four_pages: Engine) -> None:
    begun(four_pages, [1], room=60)
    waiting = four_pages.open(SequenceRequest([1], 10, GREEDY))
    assert waiting.cancel()
    eventually(lambda: four_pages.stats().num_waiting == 0)
    assert four_pages.stats().num_sequences == 1


# Shared prefixes


@pytest.mark.parametrize("closed_before", [False, True])
def test_a_known_beginning_is_not_computed_again(model: Model, engine: MakeEngine, closed_before: bool) -> None:
    running = engine(model)
    prompt, rest = random_tokens(100, seed=1), random_tokens(20, seed=2)
    first = opened(running, prompt)
    if closed_before:
        running.close(first)
        eventually(lambda: running.stats().kv_bytes == 0)
    assert running.stats().tokens_processed == 99
    second = begun(running, prompt + rest)
    prefilled = done(running.submit(prefill(second)))
    assert prefilled.cached_tokens == second.cached_tokens == 96
    assert running.stats().tokens_processed == 99 + 119 - 96
    assert_cache_is_fresh(second, model)
    assert decode(running, second, 1) == [int(logits_after(model, prompt + rest).argmax())]


def test_the_next_turn_of_a_chat_computes_only_what_is_new(model: Model, engine: MakeEngine) -> None:
    """The output of the turn before is known too."""
    running = engine(model)
    first = opened(running, random_tokens(40, seed=1))
    history = first.prompt + list(decode(running, first, 30))
    running.close(first)
    second = opened(running, history + random_tokens(10, seed=2))
    assert second.cached_tokens == (len(history) - 1) // PAGE * PAGE == 64
    assert_cache_is_fresh(second, model)


@pytest.mark.parametrize("budget", [32, 40])
def test_two_who_read_the_same_at_the_same_time_share_the_work(
    model: Model, engine: MakeEngine, gates: Callable[[Model], Gate], budget: int
) -> None:
    """The second takes over what the first has read, while both are still reading."""
    gate = gates(model)
    running = engine(model, max_batch_tokens=budget)
    prompt = random_tokens(321, seed=1)
    first, second = begun(running, prompt), begun(running, prompt)
    reading = [running.submit(prefill(first))]
    gate.wait()
    reading.append(running.submit(prefill(second)))
    gate.open()
    list(map(done, reading))
    assert running.stats().tokens_processed < 320 + 2 * budget
    for sequence in (first, second):
        assert_cache_is_fresh(sequence, model)
    assert decode(running, first, 8) == decode(running, second, 8)


def test_what_is_taken_over_belongs_to_the_same_text(
    model: Model, engine: MakeEngine, gates: Callable[[Model], Gate]
) -> None:
    """Prompts that repeat themselves: a page like the first may follow the first in another prompt."""
    gate = gates(model)
    running = engine(model, max_batch_tokens=PAGE)
    page, other = random_tokens(PAGE, seed=1), random_tokens(4 * PAGE, seed=2)
    begins, repeats = begun(running, page + other), begun(running, page * 5)
    reading = [running.submit(prefill(repeats))]
    gate.wait()
    reading.append(running.submit(prefill(begins)))
    gate.open()
    list(map(done, reading))
    for sequence in (begins, repeats):
        assert_cache_is_fresh(sequence, model)


def test_rolling_back_does_not_touch_what_is_shared(model: Model, engine: MakeEngine) -> None:
    """One sequence drafts wrongly, rolls back and writes on; the other does not notice."""
    running = engine(model)
    prompt = random_tokens(70, seed=1)
    first, second = opened(running, prompt), opened(running, prompt)
    assert second.cached_tokens == 64
    before = contents(second.cache)
    for round_number in range(8):
        draft = certain_draft(len(first.output), random_tokens(5, seed=round_number))
        done(running.submit(verification(first, draft, "published", 10.0)))
    for now, then in zip(contents(second.cache), before, strict=True):
        assert torch.equal(now, then)
    assert decode(running, second, len(first.output)) == first.output
    running.close(first)
    assert_cache_is_fresh(second, model)


def test_outputs_do_not_depend_on_how_much_room_there_is(model: Model, engine: MakeEngine) -> None:
    """Evicting, fragmenting and sharing all the time, a small engine writes what a large one writes."""
    large = engine(model)
    small = engine(model, kv_bytes=12 * PAGE * model.layout.bytes_per_token, max_batch_tokens=24)
    prompts = [random_tokens(40, seed=i // 4) + random_tokens(7 * i % 50 + 1, seed=i) for i in range(16)]
    waiting = [small.open(SequenceRequest(prompt, 20, GREEDY)) for prompt in prompts]
    for i, future in enumerate(waiting):
        sequence = done(future)
        done(small.submit(prefill(sequence)))
        alone = opened(large, prompts[i], room=20)
        assert decode(small, sequence, 15) == decode(large, alone, 15)
        small.close(sequence)
    assert small.stats().kv.evicted_pages > 10
    assert small.stats().kv.hit_tokens > 50
    eventually(lambda: small.stats().kv_bytes == 0)


def test_an_expired_sequence_gives_its_room_to_who_waits(model: Model, engine: MakeEngine) -> None:
    running = engine(model, kv_bytes=4 * PAGE * model.layout.bytes_per_token, idle_timeout=0.05)
    forgotten = begun(running, [1], room=60)
    done(running.open(SequenceRequest([1], 60, GREEDY)))
    with pytest.raises(SequenceClosed):
        running.get(forgotten.id)
