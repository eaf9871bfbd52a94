"""The batching engine: scheduling never changes what comes out, and one request never harms another."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gate import Gate

from rapid.engine import Engine, Extend, Sequence, Task
from rapid.errors import SequenceClosed
from rapid.model import Model
from rapid.sampling import SamplingParams
from rapid.speculative import RULES
from rapid.tasks import Draft, Verified, prefill, propose, verify_draft

MakeModel = Callable[..., Model]
MakeEngine = Callable[..., Engine]
GREEDY = SamplingParams(temperature=0)
VOCAB = 32
# A pass over another number of tokens rounds float32 differently: here by up to 2.4e-6.
ROUNDING = {"rtol": 0, "atol": 2e-5}


def random_tokens(length: int, seed: int) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def done(future: Future[Any]) -> Any:
    return future.result(timeout=30)


def eventually(condition: Callable[[], bool]) -> None:
    """Waits until ``condition`` holds; fails after 10 seconds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.002)


@pytest.fixture
def model(tiny_model: MakeModel) -> Model:
    return tiny_model(VOCAB)


@pytest.fixture
def gate(model: Model, gates: Callable[[Model], Gate]) -> Gate:
    return gates(model)


def opened(engine: Engine, prompt: list[int], sampling: SamplingParams = GREEDY, capacity: int = 400) -> Sequence:
    """A new sequence whose prompt is read."""
    sequence = engine.open(capacity, sampling)
    done(engine.submit(prefill(sequence, prompt)))
    return sequence


def decode(engine: Engine, sequence: Sequence, num_tokens: int) -> list[int]:
    """Plain decoding, a token a round."""
    for _ in range(num_tokens):
        done(engine.submit(verify_draft(sequence, Draft(len(sequence.output)), "lossless", 0.0)))
    return sequence.output


def draft_of(offset: int, tokens: list[int]) -> Draft:
    """A draft whose drafter was certain of every token."""
    certain = (np.array([1.0], dtype=np.float32),)
    return Draft(offset, tokens, [(np.array([token], dtype=np.int32), *certain) for token in tokens])


def assert_cache_is_fresh(sequence: Sequence, model: Model) -> None:
    """What is cached equals a prefill of the same tokens in one pass."""
    length = sequence.cache.length
    tokens = (sequence.prompt + sequence.output)[:length]
    fresh = model.new_cache(length)
    model.forward([(fresh, tokens, 0)])
    torch.testing.assert_close(sequence.cache.keys[:, :, :length], fresh.keys, **ROUNDING)
    torch.testing.assert_close(sequence.cache.values[:, :, :length], fresh.values, **ROUNDING)


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
        draft = draft_of(at, expected[at : at + num_right] + wrong)
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
    sampled = SamplingParams(temperature=1.0, seed=3)
    sequence, short = (opened(running, random_tokens(60, seed=4), sampled), opened(drafting, [1, 2, 3], sampled))
    known, seen = 0, set()
    for round_number in range(25):
        gamma = round_number % 6
        draft = Draft(len(sequence.output))
        if gamma:
            new = sequence.output[known:]
            draft = done(drafting.submit(propose(short, known, new, gamma, 8, frozenset())))
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
    first = done(running.submit(propose(sequence, 0, [], 5, 8, frozenset()))).tokens
    for kept in range(6):
        again = done(running.submit(propose(sequence, 0, first[:kept], 5 - kept, 8, frozenset())))
        assert (again.offset, again.tokens) == (kept, first[kept:])
        assert_cache_is_fresh(sequence, model)
        sequence.output[:] = first


def test_a_draft_ends_at_an_end_of_sequence(model: Model, engine: MakeEngine) -> None:
    running = engine(model)
    prompt = random_tokens(20, seed=6)
    whole = done(running.submit(propose(opened(running, prompt), 0, [], 8, 8, frozenset()))).tokens
    eos = whole[3]
    draft = done(running.submit(propose(opened(running, prompt), 0, [], 8, 8, frozenset([eos]))))
    assert draft.tokens == whole[: whole.index(eos) + 1]


def test_a_draft_tells_the_distributions_it_was_drawn_from(model: Model, engine: MakeEngine) -> None:
    """k pairs a token that sum to 1, the drafted token among them; dense() spreads them over the vocabulary."""
    running = engine(model)
    sequence = opened(running, random_tokens(20, seed=7), SamplingParams(seed=1))
    draft: Draft = done(running.submit(propose(sequence, 0, [], 6, 4, frozenset())))
    dense = draft.dense(VOCAB, torch.device("cpu"))
    torch.testing.assert_close(dense.sum(-1), torch.ones(6))
    assert ((dense > 0).sum(-1) == 4).all()
    assert (dense.gather(-1, torch.tensor(draft.tokens)[:, None]) > 0).all()
    cache = model.new_cache(30)
    logits = model.forward([(cache, sequence.prompt + draft.tokens[:-1], 6)])[0]
    kept = torch.where(dense > 0, logits.softmax(-1), 0.0)
    torch.testing.assert_close(dense, kept / kept.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)


def test_a_draft_for_another_position_is_an_error(model: Model, engine: MakeEngine) -> None:
    """A lost or doubled round must never become a wrong text; the sequence itself is unharmed."""
    running = engine(model)
    sequence = opened(running, random_tokens(20, seed=8))
    before = list(decode(running, sequence, 2))
    for offset in (0, 1, 3):
        with pytest.raises(ValueError, match=f"position {offset} met a sequence at 2"):
            done(running.submit(verify_draft(sequence, draft_of(offset, [1]), "published", 1.0)))
    assert sequence.output == before
    assert len(decode(running, sequence, 1)) == 3


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=0.8, seed=9)])
def test_many_at_once_equal_each_alone(tiny_model: MakeModel, engine: MakeEngine, sampling: SamplingParams) -> None:
    """Requests of all lengths share passes, and get what they would have got alone."""
    model = tiny_model(VOCAB, seed=3)
    prompts = [random_tokens(n, seed=n) for n in (1, 2, 9, 30, 64, 65, 100, 129, 200, 13, 77, 150)]

    def verification(running: Engine, i: int, sequence: Sequence, round_number: int) -> Future[Verified]:
        draft = draft_of(len(sequence.output), random_tokens((i + round_number) % 4, seed=i))
        return running.submit(verify_draft(sequence, draft, "augmented", 5.0))

    running = engine(model, max_batch_tokens=48)
    together = [running.open(300, sampling) for _ in prompts]
    list(map(done, [running.submit(prefill(s, prompt)) for s, prompt in zip(together, prompts, strict=True)]))
    for round_number in range(6):
        list(map(done, [verification(running, i, s, round_number) for i, s in enumerate(together)]))
    for i, prompt in enumerate(prompts):
        alone = opened(running, prompt, sampling)
        for round_number in range(6):
            done(verification(running, i, alone, round_number))
        assert together[i].output == alone.output


def test_closing_in_the_middle_of_a_prefill_frees_it_within_a_step(
    model: Model, engine: MakeEngine, gate: Gate
) -> None:
    running = engine(model, max_batch_tokens=10)
    doomed, other = running.open(400, GREEDY), running.open(400, GREEDY)
    reading = running.submit(prefill(doomed, random_tokens(201, seed=10)))
    gate.wait()
    gate.step()
    running.close(doomed)
    assert running.stats().num_sequences == 1
    assert running.stats().kv_bytes == 400 * model.layout.bytes_per_token
    going_on = running.submit(prefill(other, random_tokens(21, seed=11)))
    gate.step()  # the pass that was waiting when the sequence was closed is its last
    with pytest.raises(SequenceClosed):
        done(reading)
    gate.open()
    assert done(going_on) >= 0
    assert sum(map(sum, gate.passes)) == 10 + 10 + 20
    with pytest.raises(SequenceClosed, match=f"sequence {doomed.id} is closed"):
        running.get(doomed.id)
    assert running.get(other.id) is other
    with pytest.raises(SequenceClosed):  # and whatever is asked of it later
        done(running.submit(prefill(doomed, [1, 2, 3])))


def test_a_task_that_fails_fails_alone(model: Model, engine: MakeEngine) -> None:
    running = engine(model)
    sequence = opened(running, random_tokens(20, seed=12))

    def failing(before: bool) -> Task[None]:
        if before:
            raise KeyError("before its first step")
        yield Extend(running.open(10, GREEDY), [1, 2], 1)
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

    def broken(segments: Any) -> Any:
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
    first = running.submit(prefill(running.open(10, GREEDY), [1, 2, 3]))
    gate.wait()
    second = running.submit(prefill(running.open(10, GREEDY), [1, 2, 3, 4]))
    assert second.cancel()
    gate.open()
    done(first)
    done(running.submit(prefill(running.open(10, GREEDY), [1, 2, 3, 4, 5])))
    assert gate.passes == [[2], [4]]


def test_a_sequence_nobody_uses_expires(model: Model, engine: MakeEngine) -> None:
    running = engine(model, idle_timeout=0.05)
    sequence = running.open(10, GREEDY)
    sequence.ended.result(timeout=10)
    assert running.stats().num_sequences == 0
    with pytest.raises(SequenceClosed):
        running.get(sequence.id)


def test_a_sequence_in_use_does_not_expire(model: Model, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for it and running it both count as use."""
    later = 0.0
    monkeypatch.setattr("rapid.engine.time", SimpleNamespace(monotonic=lambda: time.monotonic() + later))
    running = engine(model, idle_timeout=100)
    asked, run, forgotten = (running.open(40, GREEDY) for _ in range(3))
    later = 80.0
    running.get(asked.id)
    done(running.submit(prefill(run, [1, 2])))
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
    monkeypatch.setattr("rapid.engine.time", SimpleNamespace(monotonic=lambda: time.monotonic() + later))
    running = engine(model, idle_timeout=100, max_batch_tokens=10)
    short, long = running.open(400, GREEDY), running.open(400, GREEDY)
    first = running.submit(prefill(short, random_tokens(21, seed=22)))
    gate.wait()
    waiting = running.submit(prefill(long, random_tokens(101, seed=23)))
    gate.step()
    assert gate.passes == [[10], [10]]
    later = 200.0
    gate.open()
    done(first)
    assert done(waiting) >= 0


def test_shutdown_fails_what_is_running_and_what_comes_later(model: Model, engine: MakeEngine, gate: Gate) -> None:
    running = engine(model, max_batch_tokens=10)
    reading = running.submit(prefill(running.open(400, GREEDY), random_tokens(100, seed=14)))
    gate.wait()
    waiting = running.submit(prefill(running.open(400, GREEDY), random_tokens(100, seed=15)))
    other = running.open(400, GREEDY)
    assert running.submit(prefill(other, random_tokens(100, seed=16))).cancel()
    stopping = threading.Thread(target=running.shutdown)
    stopping.start()
    eventually(lambda: running.submit(prefill(other, [1])).done())
    gate.open()
    stopping.join(timeout=30)
    assert not stopping.is_alive()
    for future in (reading, waiting, running.submit(prefill(other, [1, 2]))):
        with pytest.raises(SequenceClosed, match="shutting down"):
            done(future)
    assert len(gate.passes) == 1


def test_a_pass_keeps_to_its_budget_and_short_requests_go_first(model: Model, engine: MakeEngine, gate: Gate) -> None:
    """While a long prompt is read, others' short requests are in the very next pass, and it takes what they leave."""
    running = engine(model, max_batch_tokens=16)
    long, short, shorter = (running.open(400, GREEDY) for _ in range(3))
    reading = running.submit(prefill(long, random_tokens(101, seed=17)))
    gate.wait()
    others = [running.submit(prefill(short, random_tokens(7, seed=18)))]
    others.append(running.submit(prefill(shorter, random_tokens(4, seed=19))))
    gate.step()
    gate.open()
    list(map(done, [*others, reading]))
    assert gate.passes[:3] == [[16], [3, 6, 7], [16]]
    assert max(map(sum, gate.passes)) == 16
    assert sum(map(sum, gate.passes)) == 100 + 6 + 3


def test_rows_that_are_wanted_together_are_never_cut(model: Model, engine: MakeEngine, gate: Gate) -> None:
    """A verification needs all its rows from one pass: what leads up to them is cut, they wait for room."""
    running = engine(model, max_batch_tokens=8)
    sequence, other = running.open(400, GREEDY), running.open(400, GREEDY)

    def verification(num_tokens: int, num_rows: int) -> Task[tuple[int, ...]]:
        logits = yield Extend(sequence, [1] * num_tokens, num_rows)
        return tuple(logits.shape)

    blocking = running.submit(prefill(other, [1, 2]))
    gate.wait()
    verifying = running.submit(verification(11, 6))
    gate.open()
    done(blocking)
    assert done(verifying) == (6, VOCAB)
    assert gate.passes == [[1], [5], [6]]


def test_more_rows_than_the_budget_run_alone(model: Model, engine: MakeEngine, gate: Gate) -> None:
    running = engine(model, max_batch_tokens=4)
    sequence, other = running.open(400, GREEDY), running.open(400, GREEDY)

    def verification() -> Task[tuple[int, ...]]:
        logits = yield Extend(sequence, [1] * 9, 9)
        return tuple(logits.shape)

    reading = running.submit(prefill(other, random_tokens(11, seed=20)))
    gate.wait()
    verifying = running.submit(verification())
    gate.open()
    done(reading)
    assert done(verifying) == (9, VOCAB)
    assert [9] in gate.passes
    assert all(sum(sizes) <= 4 for sizes in gate.passes if sizes != [9])


def test_stats_count_what_was_done(model: Model, engine: MakeEngine) -> None:
    running = engine(model)
    assert running.stats() == (0, 0, 0, 0)
    sequence = opened(running, random_tokens(21, seed=21), capacity=40)
    decode(running, sequence, 3)
    assert running.stats() == (1, 40 * model.layout.bytes_per_token, 4, 23)
    running.close(sequence)
    running.close(sequence)  # twice is once
    assert running.stats() == (0, 0, 4, 23)
