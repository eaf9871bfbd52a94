"""The batching engine: scheduling never changes what comes out, and one request never harms another."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gate import Gate
from running import (
    GREEDY,
    VOCAB,
    assert_cache_is_fresh,
    begun,
    decode,
    done,
    eventually,
    new_cache,
    opened,
    random_tokens,
)

from rapid.attention import Extension
from rapid.control import DraftLimits
from rapid.engine import Engine
from rapid.errors import SequenceClosed
from rapid.model import Model
from rapid.sampling import SamplingParams, probabilities
from rapid.sequence import Extend, Opening, Sequence, Task
from rapid.speculative import RULES
from rapid.tasks import Draft, Verified, certain_draft, prefill, propose, verify_draft

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


@pytest.mark.parametrize("num_right", range(6))
def test_a_greedy_round_accepts_the_right_part_of_a_draft_and_rolls_back(
    model: Model, engine: MakeEngine, num_right: int
) -> None:
    """Drafts right up to any position, round after round: the output is plain decoding's, the cache fresh."""
    running = engine(model)
    prompt = random_tokens(50, seed=2)
    expected = list(decode(running, opened(running, prompt), 40))
    sequence = opened(running, prompt)
    for _ in range(5):
        at = len(sequence.output)
        wrong = [(token + 1) % VOCAB for token in expected[at + num_right : at + 5]]
        draft = certain_draft(at, expected[at : at + num_right] + wrong)
        verified = done(running.submit(verify_draft(sequence, draft, "published", 10.0)))
        assert (verified.num_drafted, verified.num_accepted) == (5, num_right)
        assert verified.tokens == expected[at : at + num_right + 1]
        assert sequence.output == expected[: at + num_right + 1]
        assert sequence.cache.length == len(prompt) + len(sequence.output) - 1
        assert_cache_is_fresh(sequence, model)


@pytest.mark.parametrize("rule", RULES)
def test_rolling_back_equals_never_having_drafted(tiny_model: MakeModel, engine: MakeEngine, rule: str) -> None:
    """Whatever is accepted and rejected, round after round, both caches are those of a fresh prefill."""
    target, drafter = tiny_model(VOCAB, seed=1), tiny_model(VOCAB, seed=2)
    running, drafting = engine(target), engine(drafter)
    sampled = SamplingParams(temperature=2.0, seed=3)
    sequence, short = (opened(running, random_tokens(60, seed=4), sampled), opened(drafting, [1, 2, 3], sampled))
    known, seen = 0, set()
    for round_number in range(25):
        gamma = round_number % 6
        draft = Draft(len(sequence.output))
        if gamma:
            new = sequence.output[known:]
            draft = done(drafting.submit(propose(short, known, new, DraftLimits(gamma), 8, frozenset())))
            known = len(sequence.output)
            assert_cache_is_fresh(short, drafter)
        verified: Verified = done(running.submit(verify_draft(sequence, draft, rule, 10.0)))
        seen.add(verified.num_accepted)
        assert sequence.output[draft.offset :] == verified.tokens
        assert sequence.cache.length == len(sequence.prompt) + len(sequence.output) - 1
        assert_cache_is_fresh(sequence, target)
    assert len(seen) > 2


def test_a_recovered_token_may_be_the_rejected_one(model: Model, engine: MakeEngine) -> None:
    """Eq. 10's residual can draw the very token that was rejected: nothing disagrees, and drafting must still go on."""
    running = engine(model)
    sequence = opened(running, random_tokens(20, seed=5))
    first = done(running.submit(propose(sequence, 0, [], DraftLimits(5), 8, frozenset()))).tokens
    for kept in range(6):
        again = done(running.submit(propose(sequence, 0, first[:kept], DraftLimits(5 - kept), 8, frozenset())))
        assert (again.offset, again.tokens) == (kept, first[kept:])
        assert_cache_is_fresh(sequence, model)
        sequence.output[:] = first


def test_a_draft_ends_at_an_end_of_sequence(model: Model, engine: MakeEngine) -> None:
    running = engine(model)
    prompt = random_tokens(20, seed=6)
    whole = done(running.submit(propose(opened(running, prompt), 0, [], DraftLimits(8), 8, frozenset()))).tokens
    eos = whole[3]
    draft = done(running.submit(propose(opened(running, prompt), 0, [], DraftLimits(8), 8, frozenset([eos]))))
    assert draft.tokens == whole[: whole.index(eos) + 1]


@pytest.mark.parametrize(
    ("sampling", "top_k"), [(SamplingParams(seed=1), 4), (SamplingParams(seed=1, top_p=0.7), 4096)]
)
def test_a_draft_tells_the_distributions_it_was_drawn_from(
    model: Model, engine: MakeEngine, sampling: SamplingParams, top_k: int
) -> None:
    """The k likeliest that are possible at all, renormalised, the drafted token among them; dense() spreads them."""
    running = engine(model)
    sequence = opened(running, random_tokens(20, seed=7), sampling)
    draft: Draft = done(running.submit(propose(sequence, 0, [], DraftLimits(6), top_k, frozenset())))
    dense = draft.dense(VOCAB, torch.device("cpu"))
    tokens = torch.tensor(draft.tokens)[:, None]
    assert (dense.gather(-1, tokens) > 0).all()
    logits = model.forward([Extension(new_cache(model, 30), sequence.prompt + draft.tokens[:-1], 6)])[0]
    q = probabilities(logits, sampling)
    sizes = [len(ids) for ids, _ in draft.distributions]
    assert sizes == (q > 0).sum(-1).clamp_max(top_k).tolist()
    assert sum(sizes) < 6 * VOCAB
    kept = torch.stack(
        [torch.where(row >= row.topk(size).values[-1], row, 0) for row, size in zip(q, sizes, strict=True)]
    )
    torch.testing.assert_close(dense, kept / kept.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)
    confidences = logits.softmax(-1).gather(-1, tokens)[:, 0]
    torch.testing.assert_close(torch.tensor(draft.confidences), confidences, rtol=1e-4, atol=1e-6)


def test_a_draft_ends_behind_a_token_that_leaves_little_hope(model: Model, engine: MakeEngine) -> None:
    """And the sequence forgets nothing and keeps nothing of what was not drafted."""
    running = engine(model)
    prompt = random_tokens(20, seed=7)
    whole: Draft = done(running.submit(propose(opened(running, prompt), 0, [], DraftLimits(8), 8, frozenset())))
    certain = (1.0,) * 9
    limits = DraftLimits(8, floor=0.5, acceptance=(*(0.0 for _ in certain[1:]), 1.0))  # stops at any token under 97 %
    sequence = opened(running, prompt)
    draft: Draft = done(running.submit(propose(sequence, 0, [], limits, 8, frozenset())))
    stop = next(i for i, confidence in enumerate(whole.confidences) if confidence < 0.97)
    assert draft.tokens == whole.tokens[: stop + 1] == sequence.output
    assert_cache_is_fresh(sequence, model)
    limits = DraftLimits(8, floor=0.5, acceptance=certain)
    assert done(running.submit(propose(sequence, 0, [], limits, 8, frozenset()))).tokens == whole.tokens


def test_a_draft_for_another_position_is_an_error(model: Model, engine: MakeEngine) -> None:
    """A lost or doubled round must never become a wrong text; the sequence itself is unharmed."""
    running = engine(model)
    sequence = opened(running, random_tokens(20, seed=8))
    before = list(decode(running, sequence, 2))
    for offset in (0, 1, 3):
        with pytest.raises(ValueError, match=f"position {offset} met a sequence at 2"):
            done(running.submit(verify_draft(sequence, certain_draft(offset, [1]), "published", 1.0)))
    assert sequence.output == before
    assert len(decode(running, sequence, 1)) == 3


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=0.8, seed=9)])
def test_many_at_once_equal_each_alone(tiny_model: MakeModel, engine: MakeEngine, sampling: SamplingParams) -> None:
    """Requests of all lengths share passes, and get what they would have got alone."""
    model = tiny_model(VOCAB, seed=3)
    prompts = [random_tokens(n, seed=n) for n in (1, 2, 9, 30, 64, 65, 100, 129, 200, 13, 77, 150)]

    def verification(running: Engine, i: int, sequence: Sequence, round_number: int) -> Future[Verified]:
        draft = certain_draft(len(sequence.output), random_tokens((i + round_number) % 4, seed=i))
        return running.submit(verify_draft(sequence, draft, "augmented", 5.0))

    running = engine(model, max_batch_tokens=48)
    together = [begun(running, prompt, sampling) for prompt in prompts]
    list(map(done, [running.submit(prefill(sequence)) for sequence in together]))
    for round_number in range(6):
        list(map(done, [verification(running, i, s, round_number) for i, s in enumerate(together)]))
    lonely = engine(model, max_batch_tokens=48)
    for i, prompt in enumerate(prompts):
        alone = opened(lonely, prompt, sampling)
        for round_number in range(6):
            done(verification(lonely, i, alone, round_number))
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


def test_a_task_that_fails_fails_alone(model: Model, engine: MakeEngine) -> None:
    running = engine(model)
    sequence, other = opened(running, random_tokens(20, seed=12)), begun(running, [1])

    def failing(before: bool) -> Task[None]:
        if before:
            raise KeyError("before its first step")
        yield Extend(other, [1, 2], 1)
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

    def broken(extensions: Any, **_: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", broken)
        for failed in [running.submit(verify_draft(s, Draft(0), "lossless", 0.0)) for s in (sequence, other)]:
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


def test_a_sequence_nobody_uses_expires(model: Model, engine: MakeEngine) -> None:
    running = engine(model, idle_timeout=0.05)
    sequence = begun(running, [1])
    sequence.ended.result(timeout=10)
    assert running.stats().num_sequences == 0
    with pytest.raises(SequenceClosed):
        running.get(sequence.id)


def set_clock(monkeypatch: pytest.MonkeyPatch, now: Callable[[], float]) -> None:
    for module in ("engine", "admission"):
        monkeypatch.setattr(f"rapid.{module}.time", SimpleNamespace(monotonic=now))


def test_a_sequence_in_use_does_not_expire(model: Model, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for it and running it both count as use."""
    later = 0.0
    set_clock(monkeypatch, lambda: time.monotonic() + later)
    running = engine(model, idle_timeout=100)
    asked, run, forgotten = (begun(running, [1, 2]) for _ in range(3))
    later = 80.0
    running.get(asked.id)
    done(running.submit(prefill(run)))
    later = 120.0
    forgotten.ended.result(timeout=10)
    assert running.stats().num_sequences == 2
    assert running.get(asked.id) is asked
    assert running.get(run.id) is run


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
    waiting, opening = running.submit(prefill(second)), running.open(Opening([1, 2, 3], 100, GREEDY))
    assert running.submit(prefill(other)).cancel()
    assert running.open(Opening([1, 2, 3], 10, GREEDY)).cancel()
    stopping = threading.Thread(target=running.shutdown)
    stopping.start()
    eventually(lambda: running.submit(prefill(other)).done())
    gate.open()
    stopping.join(timeout=30)
    assert not stopping.is_alive()
    late = running.submit(prefill(other)), running.open(Opening([1, 2, 3], 10, GREEDY))
    for future in (reading, waiting, opening, *late):
        with pytest.raises(SequenceClosed, match="shutting down"):
            done(future)
    assert len(gate.passes) == 1


def test_a_pass_keeps_to_its_budget_and_short_requests_go_first(model: Model, engine: MakeEngine, gate: Gate) -> None:
    """While a long prompt is read, others' short requests are in the very next pass, and it takes what they leave."""
    running = engine(model, max_batch_tokens=16)
    long, short, shorter = (begun(running, random_tokens(n, seed=n)) for n in (101, 7, 4))
    reading = running.submit(prefill(long))
    gate.wait()
    others = [running.submit(prefill(sequence)) for sequence in (short, shorter)]
    gate.step()
    gate.open()
    list(map(done, [*others, reading]))
    assert gate.passes[:3] == [[16], [3, 6, 7], [16]]
    assert max(map(sum, gate.passes)) == 16
    assert sum(map(sum, gate.passes)) == 100 + 6 + 3


def test_rows_that_are_wanted_together_are_never_cut(model: Model, engine: MakeEngine, gate: Gate) -> None:
    """A verification needs all its rows from one pass: what leads up to them is cut, they wait for room."""
    running = engine(model, max_batch_tokens=8)
    sequence, other = (begun(running, prompt) for prompt in ([1], [1, 2]))

    def verification(num_tokens: int, num_rows: int) -> Task[tuple[int, ...]]:
        logits = yield Extend(sequence, [1] * num_tokens, num_rows)
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
        logits = yield Extend(sequence, [1] * 9, 9)
        return tuple(logits.shape)

    reading = running.submit(prefill(other))
    gate.wait()
    verifying = running.submit(verification())
    gate.open()
    done(reading)
    assert done(verifying) == (9, VOCAB)
    assert [9] in gate.passes
    assert all(sum(sizes) <= 4 for sizes in gate.passes if sizes != [9])


def test_stats_count_what_was_done(model: Model, engine: MakeEngine) -> None:
    running = engine(model)
    nothing = running.stats()
    assert (nothing.num_sequences, nothing.num_waiting, nothing.kv_bytes, *nothing[-2:]) == (0, 0, 0, 0, 0)
    sequence = opened(running, random_tokens(21, seed=21), room=19)
    decode(running, sequence, 3)
    stats = running.stats()
    assert (stats.num_sequences, *stats[-2:]) == (1, 4, 23)
    assert stats.kv_bytes == stats.kv.bytes_used == 3 * 16 * model.layout.bytes_per_token  # 40 tokens, in whole pages
    running.close(sequence)
    running.close(sequence)  # twice is once
    assert running.stats().num_sequences == 0
    eventually(lambda: running.stats().kv_bytes == 0)
    assert running.stats()[-2:] == (4, 23)
