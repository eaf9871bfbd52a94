"""What a task does to a sequence: drafts, verifies and rolls back, and no token or cached row is ever off."""

from collections.abc import Callable

import pytest
import torch
from running import VOCAB, assert_cache_is_fresh, decode, done, new_cache, opened, proposal, random_tokens, verification

from rapid.engine.engine import Engine
from rapid.kernels.interface import BatchEntry
from rapid.models.model import Model
from rapid.sampling.params import SamplingParams
from rapid.sampling.sampler import probabilities
from rapid.speculation.draft import Draft, DraftLimits, VerifyResult, certain_draft
from rapid.speculation.rows import dense
from rapid.speculation.verification import RULES

MakeModel = Callable[..., Model]
MakeEngine = Callable[..., Engine]


@pytest.fixture
def model(tiny_model: MakeModel) -> Model:
    return tiny_model(VOCAB)


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
        verified = done(running.submit(verification(sequence, draft, "published", 10.0)))
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
            draft = done(drafting.submit(proposal(short, known, new, DraftLimits(gamma), 8, frozenset())))
            known = len(sequence.output)
            assert_cache_is_fresh(short, drafter)
        verified: VerifyResult = done(running.submit(verification(sequence, draft, rule, 10.0)))
        seen.add(verified.num_accepted)
        assert sequence.output[draft.offset :] == verified.tokens
        assert sequence.cache.length == len(sequence.prompt) + len(sequence.output) - 1
        assert_cache_is_fresh(sequence, target)
    assert len(seen) > 2


def test_a_recovered_token_may_be_the_rejected_one(model: Model, engine: MakeEngine) -> None:
    """Eq. 10's residual can draw the very token that was rejected: nothing disagrees, and drafting must still go on."""
    running = engine(model)
    sequence = opened(running, random_tokens(20, seed=5))
    first = done(running.submit(proposal(sequence, 0, [], DraftLimits(5), 8, frozenset()))).tokens
    for kept in range(6):
        again = done(running.submit(proposal(sequence, 0, first[:kept], DraftLimits(5 - kept), 8, frozenset())))
        assert (again.offset, again.tokens) == (kept, first[kept:])
        assert_cache_is_fresh(sequence, model)
        sequence.output[:] = first


def test_a_draft_ends_at_an_end_of_sequence(model: Model, engine: MakeEngine) -> None:
    running = engine(model)
    prompt = random_tokens(20, seed=6)
    whole = done(running.submit(proposal(opened(running, prompt), 0, [], DraftLimits(8), 8, frozenset()))).tokens
    eos = whole[3]
    draft = done(running.submit(proposal(opened(running, prompt), 0, [], DraftLimits(8), 8, frozenset([eos]))))
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
    draft: Draft = done(running.submit(proposal(sequence, 0, [], DraftLimits(6), top_k, frozenset())))
    pairs = [tuple(torch.from_numpy(part).view(1, -1) for part in each) for each in draft.distributions]
    spread = torch.cat([dense(ids.long(), weights, VOCAB) for ids, weights in pairs])
    tokens = torch.tensor(draft.tokens)[:, None]
    assert (spread.gather(-1, tokens) > 0).all()
    logits = model.forward([BatchEntry(new_cache(model, 30), sequence.prompt + draft.tokens[:-1], 6)])[0]
    q = probabilities(logits, sampling)
    sizes = [len(ids) for ids, _ in draft.distributions]
    assert sizes == (q > 0).sum(-1).clamp_max(top_k).tolist()
    assert sum(sizes) < 6 * VOCAB
    kept = torch.stack(
        [torch.where(row >= row.topk(size).values[-1], row, 0) for row, size in zip(q, sizes, strict=True)]
    )
    torch.testing.assert_close(spread, kept / kept.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)
    confidences = logits.softmax(-1).gather(-1, tokens)[:, 0]
    torch.testing.assert_close(torch.tensor(draft.confidences), confidences, rtol=1e-4, atol=1e-6)


def test_a_draft_ends_behind_a_token_that_leaves_little_hope(model: Model, engine: MakeEngine) -> None:
    """And the sequence forgets nothing and keeps nothing of what was not drafted."""
    running = engine(model)
    prompt = random_tokens(20, seed=7)
    whole: Draft = done(running.submit(proposal(opened(running, prompt), 0, [], DraftLimits(8), 8, frozenset())))
    certain = (1.0,) * 9
    limits = DraftLimits(8, floor=0.5, acceptance=(*(0.0 for _ in certain[1:]), 1.0))  # stops at any token under 97 %
    sequence = opened(running, prompt)
    draft: Draft = done(running.submit(proposal(sequence, 0, [], limits, 8, frozenset())))
    stop = next(i for i, confidence in enumerate(whole.confidences) if confidence < 0.97)
    assert draft.tokens == whole.tokens[: stop + 1] == sequence.output
    assert_cache_is_fresh(sequence, model)
    limits = DraftLimits(8, floor=0.5, acceptance=certain)
    assert done(running.submit(proposal(sequence, 0, [], limits, 8, frozenset()))).tokens == whole.tokens


def test_a_draft_for_another_position_is_an_error(model: Model, engine: MakeEngine) -> None:
    """A lost or doubled round must never become a wrong text; the sequence itself is unharmed."""
    running = engine(model)
    sequence = opened(running, random_tokens(20, seed=8))
    before = list(decode(running, sequence, 2))
    for offset in (0, 1, 3):
        with pytest.raises(ValueError, match=f"position {offset} met a sequence at 2"):
            done(running.submit(verification(sequence, certain_draft(offset, [1]), "published", 1.0)))
    assert sequence.output == before
    assert len(decode(running, sequence, 1)) == 3


@pytest.mark.parametrize("at_a_time", [False, True])
def test_drafts_drawn_together_equal_each_alone(
    model: Model, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, at_a_time: bool
) -> None:
    """Each with its own sampling, also if the host reads a draft only at its end, as on a GPU."""
    ways = [{"temperature": 0}, {"top_p": 0.5}, {"top_k": 3}, {"temperature": 3.0}, {"min_p": 0.2}, {}]
    sampling = [SamplingParams(seed=i, **way) for i, way in enumerate(ways)]  # type: ignore[arg-type]
    prompts, limits = [random_tokens(20 + i, seed=i) for i in range(6)], DraftLimits(4)
    lonely = engine(model)
    alone = [
        done(lonely.submit(proposal(opened(lonely, prompt, its), 0, [], limits, 8, frozenset())))
        for prompt, its in zip(prompts, sampling, strict=True)
    ]
    monkeypatch.setattr("rapid.engine.propose.is_asynchronous", lambda device: at_a_time)
    running = engine(model)
    together = [opened(running, prompt, its) for prompt, its in zip(prompts, sampling, strict=True)]
    before = running.stats().host_waits
    drafting = [running.submit(proposal(sequence, 0, [], limits, 8, frozenset())) for sequence in together]
    for ours, expected, sequence in zip(map(done, drafting), alone, together, strict=True):
        assert ours.tokens == expected.tokens
        for (ids, weights), (other_ids, other_weights) in zip(ours.distributions, expected.distributions, strict=True):
            assert ids.tolist() == other_ids.tolist()
            torch.testing.assert_close(torch.from_numpy(weights), torch.from_numpy(other_weights), rtol=1e-4, atol=1e-6)
        assert_cache_is_fresh(sequence, model)
    waited = running.stats().host_waits - before
    assert waited <= (1 if at_a_time else 4) * len(together)
    assert waited >= (1 if at_a_time else 4)
