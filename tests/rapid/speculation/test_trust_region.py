"""η as a trust region: the bound holds, a little more breaks it, and nothing but the prefix and (p, q) decides."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.common.closed_forms import Array, augmented, bound, chosen_strength, furthest, law, passes, softmax
from benchmarks.common.dense_rounds import verify_dense
from rapid.engine.verdicts import Bound, How, Verify, verdict
from rapid.sampling.noise import Noise, Purpose
from rapid.sampling.params import SamplingParams
from rapid.sampling.sampler import sample
from rapid.speculation.draft import Draft, Pairs
from rapid.speculation.trust_region import MAX_STRENGTH, MEMORY, choose, running_agreement, strongest
from rapid.speculation.verification import RULES

TRANSFERRING = ("published", "reference", "augmented")
STEP = MAX_STRENGTH / 2**20
SURE = torch.ones(1, 1, dtype=torch.float64)  # of the passages


def random_rows(rows: int, vocab: int, *, spread: float, top_k: int, seed: int) -> tuple[Array, Array]:
    """Logits, and truncated q of drafters that agree more or less."""
    rng = np.random.default_rng(seed)
    z = spread * rng.standard_normal((rows, vocab))
    y = z + rng.uniform(0, 2 * spread, (rows, 1)) * rng.standard_normal((rows, vocab))
    q = np.stack([softmax(row) for row in y])
    q = np.where(q < np.sort(q, -1)[:, -top_k, None], 0, q)
    return z, q / q.sum(-1, keepdims=True)


def probs(z: Array) -> Tensor:
    return torch.from_numpy(np.stack([softmax(row) for row in z]))


@pytest.mark.parametrize("rule", TRANSFERRING)
@pytest.mark.parametrize(("vocab", "spread", "top_k"), [(12, 2.0, 12), (12, 1.0, 3), (3000, 3.0, 64), (3000, 1.0, 64)])
def test_the_bound_holds_and_a_little_more_breaks_it(rule: str, vocab: int, spread: float, top_k: int) -> None:
    """In float64, by the definition of KL over the whole vocabulary, before and after tail protection."""
    z, q = random_rows(40, vocab, spread=spread, top_k=top_k, seed=3)
    bounds, confidences = np.geomspace(1e-4, 1.0, len(z)), np.random.default_rng(5).uniform(0.1, 1, len(z))
    held_by: Counter[str] = Counter()
    columns = (torch.from_numpy(each)[:, None] for each in (bounds, confidences))
    etas, found = strongest(RULES[rule], probs(z), torch.from_numpy(q), *columns)
    for row, its_q, eta, kl, epsilon, c in zip(
        z, q, etas.flatten().tolist(), found.flatten().tolist(), bounds, confidences, strict=True
    ):
        rounding = 1e-5 * epsilon + 1e-8  # of three terms of a series, where 2,500 tokens are as likely as the rest
        assert furthest(rule, row, its_q, eta) == pytest.approx(kl, rel=1e-5, abs=1e-8)
        assert kl <= epsilon + rounding and passes(rule, row, its_q, eta, confidence=c) <= rounding
        too_far = furthest(rule, row, its_q, eta + STEP) > epsilon - rounding
        past_m = passes(rule, row, its_q, eta + STEP, confidence=c) > -rounding
        assert eta > MAX_STRENGTH - 2 * STEP or too_far or past_m
        held_by.update(["near p"] * bool(too_far) + ["before m"] * bool(past_m))
    assert (etas > 0).all() and (etas < MAX_STRENGTH - 1).sum() > len(z) / 2
    assert held_by["near p"] >= 3 and held_by["before m"] >= 3 * (vocab == 12)


def test_what_both_models_hold_likeliest_stays_the_likeliest() -> None:
    """p holds it likelier than q does, so q − p is negative there: a strong transfer would drop it."""
    p = torch.tensor([[0.9, 0.05, 0.03, 0.02]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=torch.float64)
    rule = RULES["reference"]  # without tail protection
    strength, _ = strongest(rule, p, q, torch.tensor([[100.0]], dtype=torch.float64), SURE)
    assert 1 < strength < 10
    assert rule.augment(p, q, strength).argmax() == 0
    assert rule.augment(p, q, 20.0).argmax() != 0


@pytest.mark.parametrize("rule", TRANSFERRING)
def test_passages_that_are_less_trusted_move_less(rule: str) -> None:
    """Without the bound of ε: as far as a mixture of p and q with the confidence as q's share, and not at all for 0."""
    z, q = random_rows(50, 12, spread=2.0, top_k=6, seed=8)
    p, q_rows, far = probs(z), torch.from_numpy(q), torch.full((50, 1), 100.0, dtype=torch.float64)
    etas = [strongest(RULES[rule], p, q_rows, far, c * SURE)[0] for c in (0, 0.2, 0.6, 1)]
    assert (etas[0] < 2 * STEP).all()
    for less, more in pairwise(etas):
        assert (less <= more).all() and (less < more).any()


@pytest.mark.parametrize("rule", TRANSFERRING)
def test_a_larger_bound_never_gives_less_transfer(rule: str) -> None:
    z, q = random_rows(50, 12, spread=2.0, top_k=6, seed=4)
    p, q_rows = probs(z), torch.from_numpy(q)
    etas = [
        strongest(RULES[rule], p, q_rows, torch.full((50, 1), epsilon, dtype=p.dtype), SURE)[0]
        for epsilon in (0, 0.01, 0.1, 1)
    ]
    assert (etas[0] == 0).all()
    for less, more in pairwise(etas):
        assert (less <= more).all() and (less < more).any()
    p_hat = RULES["augmented"].augment(p, q_rows, etas[0])
    torch.testing.assert_close(p_hat, p, rtol=0, atol=1e-15)


def test_a_bound_goes_by_the_target_s_share_of_the_entropies() -> None:
    z, q = random_rows(20, 12, spread=2.0, top_k=6, seed=5)
    z[0] = np.where(np.arange(12) == 3, 0.0, -np.inf)  # a target that is sure
    most = torch.full((20, 1), 0.4, dtype=torch.float64)
    region = choose(RULES["augmented"], probs(z), torch.from_numpy(q), most, SURE)
    expected = [bound(row, its_q, 0.4) for row, its_q in zip(z, q, strict=True)]
    np.testing.assert_allclose(region.bound.flatten(), expected, rtol=0, atol=1e-12)
    assert region.strength[0] == region.bound[0] == 0
    one_hot = torch.nn.functional.one_hot(torch.tensor([1]), 4).double()
    assert choose(RULES["augmented"], one_hot, one_hot, most[:1], SURE).bound == 0  # and no 0 / 0


def test_the_agreement_is_a_running_mean_however_the_text_is_cut_into_rounds() -> None:
    found = torch.from_numpy(np.random.default_rng(6).uniform(size=12))
    expected, before = [0.7], 0.7
    for each in found.tolist():
        before = MEMORY * before + (1 - MEMORY) * each
        expected.append(before)
    for cuts in ([12], [1] * 12, [5, 3, 4]):
        written, behind = [0.7], torch.tensor([0.7], dtype=torch.float64)
        for part in found.split(cuts):
            rows = running_agreement(behind, part[None])
            written += rows[0, 1:].tolist()
            behind = rows[:, -1]
        np.testing.assert_allclose(written, expected, rtol=0, atol=1e-14)


def pairs(q: Array) -> Pairs:
    ids = np.flatnonzero(q).astype(np.int32)
    return ids, q[ids].astype(np.float32)


def verified(z: Array, q: Array, gamma: int, before: Bound, temperature: float, *, greedy: bool) -> tuple[Verify, int]:
    """A verification of γ tokens, each the likeliest of its q, and of how many rows η is chosen."""
    tokens = q[:gamma].argmax(-1).tolist()
    with_q = gamma + greedy
    how = How(
        SamplingParams(temperature=0 if greedy else temperature, seed=1),
        1,
        [pairs(row) for row in q[:with_q]],
        RULES["augmented"],
        before,
        transfer_temperature=temperature if greedy else 0,
    )
    draft = Draft(0, tokens, list(how.distributions[:gamma]), [1.0] * gamma)
    return Verify(torch.from_numpy(z[: gamma + 1]).float(), draft, how), with_q


@pytest.mark.parametrize("greedy", [False, True])
def test_a_batch_of_rounds_reports_what_was_chosen(greedy: bool) -> None:
    """Rounds of several lengths, each with its own agreement and confidence, against formulas position by position."""
    temperature = 0.8
    z, q = random_rows(7, 12, spread=2.0, top_k=4, seed=7)
    rounds = [(1, Bound(0.5, 1, 1)), (6, Bound(0.8, 0.4, 0.6)), (3, Bound(0.8, 0, 0.9)), (4, Bound(9, 0.7, 0.2))]
    wishes = [verified(z, q, gamma, before, temperature, greedy=greedy) for gamma, before in rounds]
    answers = Verify.together([wish for wish, _ in wishes])
    for (wish, with_q), values, (_, before) in zip(wishes, answers, rounds, strict=True):
        decided = verdict(values.numpy(), wish.draft, wish.how)
        a, sums, best = before.agreement, np.zeros(4), []
        for i in range(min(decided.num_accepted + 1, with_q)):
            p = softmax(z[i] / temperature)
            epsilon = bound(z[i], q[i], before.most * before.confidence * a, temperature)
            eta = chosen_strength("augmented", z[i], q[i], epsilon, temperature, confidence=before.confidence)
            best.append(int((z[i] / temperature + eta * (q[i] - p)).argmax()))
            reached = furthest("augmented", z[i], q[i], eta, temperature)
            sums += [eta, reached, epsilon, bound(z[i], q[i], 1.0, temperature)]
            a = MEMORY * a + (1 - MEMORY) * np.minimum(p, q[i]).sum()
        found = decided.transferred
        assert found is not None
        assert found.positions == min(decided.num_accepted + 1, with_q)
        np.testing.assert_allclose(found.agreement, a, rtol=0, atol=1e-6)
        np.testing.assert_allclose(found[2:], sums, rtol=1e-4, atol=1e-4)
        if greedy:
            assert decided.emitted == best


def test_augmented_stays_exactly_p_hat() -> None:
    """At each position the emitted token follows p̂ with the η that was chosen there."""
    gamma, vocab, rounds = 3, 8, 400_000
    z, q = random_rows(gamma + 1, vocab, spread=1.0, top_k=5, seed=9)
    a, etas, expected = 1.0, [], []
    for i in range(gamma):
        p = softmax(z[i])
        etas.append(chosen_strength("augmented", z[i], q[i], bound(z[i], q[i], 0.5 * a), confidence=0.7))
        expected.append(augmented("augmented", z[i], q[i], etas[-1]))
        np.testing.assert_allclose(law("augmented", z[i], q[i], etas[-1]), expected[-1], rtol=0, atol=1e-12)
        a = MEMORY * a + (1 - MEMORY) * np.minimum(p, q[i]).sum()
        assert abs(expected[-1] - p).sum() / 2 > 0.02  # the test can tell p̂ from p
    p, q_rows = probs(z).float(), torch.from_numpy(q[:gamma]).float()
    agreements = torch.minimum(p[:gamma], q_rows).double().sum(-1)
    most = 0.5 * running_agreement(torch.ones(1, dtype=torch.float64), agreements[None])[0, :gamma, None]
    strength = choose(RULES["augmented"], p[:gamma], q_rows, most, 0.7 * SURE).strength.float()
    np.testing.assert_allclose(strength.flatten(), etas, rtol=0, atol=1e-3)

    noise = Noise(torch.arange(rounds))
    draft = sample(q_rows.expand(rounds, gamma, vocab), noise.keys(Purpose.DRAFT, torch.arange(gamma)))
    num_accepted, next_token = verify_dense(
        RULES["augmented"],
        draft,
        q_rows.expand(rounds, gamma, vocab),
        p.expand(rounds, gamma + 1, vocab),
        strength.repeat(rounds, 1),
        noise,
    )
    emitted = torch.cat([draft, draft[:, :1]], -1).scatter(-1, num_accepted[:, None], next_token[:, None])
    for position in range(gamma):
        reached = emitted[num_accepted >= position, position]
        shares = torch.bincount(reached, minlength=vocab).double() / len(reached)
        assert len(reached) > 200_000
        assert float((shares - torch.from_numpy(expected[position])).abs().sum()) / 2 < 0.01
