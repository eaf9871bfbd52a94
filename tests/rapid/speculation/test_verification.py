"""The verification rules against their laws."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.common.closed_forms import Array, augmented, law, residual, softmax
from benchmarks.common.dense_rounds import draft_rows, verify_dense
from rapid.sampling.noise import Noise, Purpose
from rapid.sampling.params import SamplingParams
from rapid.sampling.sampler import probabilities, sample
from rapid.speculation.verification import RULES, verify_chosen

ETAS = (0.0, 0.5, 5.0, 20.0, 1000.0)


def functions_law(rule: str, p: Tensor, q: Tensor, eta: float) -> Tensor:
    """The same law, from the functions under test."""
    p_hat = RULES[rule].augment(p, q, eta)
    accepted = torch.minimum(q, p_hat)
    return accepted + (1 - accepted.sum(-1, keepdim=True)) * RULES[rule].residual(p, q, p_hat)


def total_variation(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().sum(-1) / 2


def random_logits(rows: int, vocab: int, *, spread: float, truncated: bool, seed: int) -> Array:
    """Rows of logits; when ``truncated``, only the 5 likeliest of each row are possible."""
    z = spread * np.random.default_rng(seed).standard_normal((rows, vocab))
    return np.where(z < np.sort(z, -1)[:, -5:-4], -np.inf, z) if truncated else z


@pytest.mark.parametrize("truncated_target", [False, True])
@pytest.mark.parametrize("truncated_draft", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_its_formula(rule: str, temperature: float, truncated_draft: bool, truncated_target: bool) -> None:
    """p̂, r and the output law equal the closed forms to rounding in float64, rows of any leading dimensions at once."""
    z = random_logits(40, 12, spread=2.0, truncated=truncated_target, seed=1)
    y = random_logits(40, 12, spread=2.0, truncated=truncated_draft, seed=2)
    p = torch.from_numpy(z / temperature).softmax(-1)
    q = torch.from_numpy(y / temperature).softmax(-1)
    for eta in ETAS:
        batched = (p.view(4, 10, 12), q.view(4, 10, 12))
        p_hat = RULES[rule].augment(*batched, eta)
        r = RULES[rule].residual(*batched, p_hat)
        for function, ours in ((augmented, p_hat), (residual, r), (law, functions_law(rule, *batched, eta))):
            expected = np.stack([function(rule, *row, eta, temperature) for row in zip(z, q.numpy(), strict=True)])
            np.testing.assert_allclose(ours.view(40, 12).numpy(), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(r.sum(-1), torch.ones(4, 10, dtype=r.dtype), rtol=0, atol=1e-12)


@pytest.mark.parametrize("truncated_draft", [False, True])
def test_what_comes_out_is_what_each_rule_promises(truncated_draft: bool) -> None:
    """lossless: p for every η. augmented: its p̂, a distribution. published and reference: p at η = 0."""
    z = random_logits(300, 50, spread=2.5, truncated=False, seed=3)
    y = random_logits(300, 50, spread=2.5, truncated=truncated_draft, seed=4)
    p, q = torch.from_numpy(z).softmax(-1), torch.from_numpy(y).softmax(-1)
    exact = {"rtol": 0, "atol": 1e-12}
    for eta in ETAS:
        torch.testing.assert_close(functions_law("lossless", p, q, eta), p, **exact)
        p_hat = RULES["augmented"].augment(p, q, eta)
        torch.testing.assert_close(p_hat.sum(-1), torch.ones(300, dtype=p.dtype), **exact)
        torch.testing.assert_close(functions_law("augmented", p, q, eta), p_hat, **exact)
    for rule in ("published", "reference"):
        torch.testing.assert_close(functions_law(rule, p, q, 0.0), p, **exact)


@pytest.mark.parametrize(("eta", "at_least"), [(5.0, 0.12), (10.0, 0.18), (20.0, 0.2), (50.0, 0.2)])
def test_the_published_rule_is_not_lossless(eta: float, at_least: float) -> None:
    """With η > 0 it moves the output a long way from p, whatever the paper's appendix B says."""
    generator = torch.Generator().manual_seed(5)
    z = 3.0 * torch.randn(200, 500, generator=generator, dtype=torch.float64)
    y = z + 1.5 * torch.randn(200, 500, generator=generator, dtype=torch.float64)
    p, q = z.softmax(-1), y.softmax(-1)
    moved = total_variation(functions_law("published", p, q, eta), p)
    assert at_least < moved.mean() < 0.35
    assert (moved > 0.05).double().mean() > 0.8


GAMMA, VOCAB = 3, 8


def one_round(z: Array, q: Tensor, rule: str, eta: float, temperature: float, rounds: int) -> tuple[Tensor, Tensor]:
    """Independent rounds over the same γ positions: (emitted tokens [rounds, γ+1], how many of them count)."""
    noise = Noise(torch.arange(rounds))  # rounds of requests with different seeds
    p = torch.from_numpy(z / temperature).softmax(-1).float().expand(rounds, GAMMA + 1, VOCAB)
    q = q.expand(rounds, GAMMA, VOCAB)
    draft = sample(q, noise.keys(Purpose.DRAFT, torch.arange(GAMMA)))
    num_accepted, next_token = verify_dense(RULES[rule], draft, q, p, eta, noise)
    emitted = torch.cat([draft, draft[:, :1]], -1).scatter(-1, num_accepted[:, None], next_token[:, None])
    return emitted, num_accepted + 1


@pytest.mark.parametrize(("temperature", "draft_top_k"), [(1.0, VOCAB), (0.5, 4)])
@pytest.mark.parametrize(
    ("rule", "eta"),
    [
        ("lossless", 20.0),
        *((rule, eta) for rule in ("published", "reference", "augmented") for eta in (0.0, 5.0, 20.0)),
    ],
)
def test_every_position_of_a_round_follows_the_law(rule: str, eta: float, temperature: float, draft_top_k: int) -> None:
    """Given that all before it were accepted, the token at a position follows the law, and the bonus token p."""
    z = random_logits(GAMMA + 1, VOCAB, spread=1.2, truncated=False, seed=6)
    # The drafter agrees well at first and badly at the end, so that most rounds reach the end.
    noise = np.array([[0.1], [0.2], [1.5]]) * np.random.default_rng(7).standard_normal((GAMMA, VOCAB))
    q = torch.zeros(GAMMA, VOCAB)
    for row, logits in zip(q, torch.from_numpy(z[:GAMMA] + noise).float(), strict=True):
        weights, indices = (logits / temperature).softmax(-1).topk(draft_top_k)
        row[indices] = weights / weights.sum()
    emitted, lengths = one_round(z, q, rule, eta, temperature, rounds=300_000)
    for position in range(GAMMA + 1):
        reached = emitted[lengths > position, position]
        assert len(reached) > (200_000 if position < GAMMA else 50_000)
        if position < GAMMA:
            expected = law(rule, z[position], q[position].double().numpy(), eta, temperature)
        else:
            expected = softmax(z[position] / temperature)
        shares = torch.bincount(reached, minlength=VOCAB).double() / len(reached)
        # The mean distance of n draws from their own law is under ½·sqrt((V − 1)/n): 0.003 and, for the bonus, 0.006.
        assert total_variation(shares, torch.from_numpy(expected)) < (0.01 if position < GAMMA else 0.02)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("eta", ETAS)
def test_greedy_accepts_exactly_the_target_s_argmax(rule: str, eta: float) -> None:
    """With one-hot p and q every rule emits the target's own greedy output, for every η, right or wrong drafts."""
    generator = torch.Generator().manual_seed(9)
    best = torch.randint(7, (2000, GAMMA + 1), generator=generator)
    wrong = (best[:, :GAMMA] + torch.randint(1, 7, (2000, GAMMA), generator=generator)) % 7
    is_right = torch.rand(2000, GAMMA, generator=generator) < 0.7
    draft = torch.where(is_right, best[:, :GAMMA], wrong)
    p, q = (torch.nn.functional.one_hot(tokens, 7).float() for tokens in (best, draft))
    num_accepted, next_token = verify_dense(RULES[rule], draft, q, p, eta, Noise(torch.arange(2000)))
    assert torch.equal(num_accepted, is_right.long().cumprod(-1).sum(-1))
    assert torch.equal(next_token, best.gather(-1, num_accepted[:, None])[:, 0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gamma", [0, 1, 5])
def test_verifying_greedily_is_verifying_at_temperature_0(rule: str, gamma: int) -> None:
    """The short way from logits gives what the rule gives for the one-hot p and q of temperature 0."""
    generator = torch.Generator().manual_seed(11)
    seen = set()
    for _ in range(100):
        logits = torch.randn(gamma + 1, 9, generator=generator)
        is_right = torch.rand(gamma, generator=generator) < 0.7
        draft = torch.where(is_right, logits[:-1].argmax(-1), logits[:-1].argmin(-1))
        p = probabilities(logits, SamplingParams(temperature=0))
        q = torch.nn.functional.one_hot(draft, 9).float()
        expected = verify_dense(RULES[rule], draft[None], q[None], p[None], 10.0, Noise(torch.tensor([12])))
        verdict = verify_chosen(draft_rows(draft[None], q[None]), logits.argmax(-1))
        assert (int(verdict.num_accepted), int(verdict.next_token)) == tuple(map(int, expected))
        seen.add(int(verdict.num_accepted))
    assert seen == set(range(gamma + 1))


@pytest.mark.parametrize("rule", RULES)
def test_a_greedy_target_overrules_a_sampled_draft(rule: str) -> None:
    """One-hot p: whatever q is and however strongly it is transferred, only the target's token comes out."""
    q = torch.tensor([[0.05, 0.9, 0.05]]).expand(1000, 1, 3)
    p = torch.tensor([1.0, 0.0, 0.0]).expand(1000, 2, 3)
    noise = Noise(torch.arange(1000))
    draft = sample(q, noise.keys(Purpose.DRAFT, torch.arange(1)))
    for eta in ETAS:
        num_accepted, next_token = verify_dense(RULES[rule], draft, q, p, eta, noise)
        assert (next_token == 0).all()
        assert num_accepted.float().mean() < 0.1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("eta", [0.0, 20.0, 1000.0])
def test_tokens_outside_the_target_s_support_never_come_out(rule: str, eta: float) -> None:
    """A drafter that loves impossible tokens gets none through: not as a draft, nor from the residual or the bonus."""
    z = random_logits(GAMMA + 1, VOCAB, spread=1.0, truncated=True, seed=12)
    impossible = torch.from_numpy(np.isinf(z))
    # How much of each draft is impossible: less at first, so that the last position is reached.
    share = torch.tensor([[0.5], [0.0], [0.9]])
    q = torch.where(impossible[:GAMMA], share / 3, (1 - share) / 5)
    emitted, lengths = one_round(z, q, rule, eta, 1.0, rounds=30_000)
    for position in range(GAMMA):
        came_out = torch.bincount(emitted[lengths > position, position], minlength=VOCAB)
        assert came_out.sum() > 300
        assert came_out[impossible[position]].sum() == 0


@pytest.mark.parametrize("rule", RULES)
def test_a_residual_without_mass_is_the_target_s_distribution(rule: str) -> None:
    """p = q leaves nothing over; a row of p must not become zeros or NaN."""
    p = torch.tensor([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
    for eta in ETAS:
        p_hat = RULES[rule].augment(p, p, eta)
        torch.testing.assert_close(p_hat, p)
        torch.testing.assert_close(RULES[rule].residual(p, p, p), p)


@pytest.mark.parametrize("rule", RULES)
def test_without_a_draft_the_target_is_sampled(rule: str) -> None:
    """γ = 0 is plain decoding."""
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    rows = p.expand(200_000, 1, 4)
    empty = torch.zeros(200_000, 0, dtype=torch.long)
    noise = Noise(torch.arange(200_000))
    num_accepted, next_token = verify_dense(RULES[rule], empty, torch.zeros(200_000, 0, 4), rows, 10.0, noise)
    assert num_accepted.sum() == 0
    assert total_variation(torch.bincount(next_token) / 200_000, p) < 0.01


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_an_enormous_transfer_stays_finite(rule: str, spread: float) -> None:
    """η = 1000 in float32 over a real vocabulary's size: probabilities that are finite, and residuals that sum to 1."""
    generator = torch.Generator().manual_seed(15)
    p, q = (spread * torch.randn(2, 8, 50_000, generator=generator)).softmax(-1)
    p_hat = RULES[rule].augment(p, q, 1000.0)
    r = RULES[rule].residual(p, q, p_hat)
    assert ((p_hat >= 0) & (p_hat <= 1)).all()
    assert (r >= 0).all()
    torch.testing.assert_close(r.sum(-1), torch.ones(8))
    assert (p_hat.sum(-1) > 0).all()


def test_more_transfer_accepts_more_of_the_draft() -> None:
    """What η is for: the acceptance rate β rises with it, while lossless ignores it."""
    z = random_logits(200, 50, spread=2.0, truncated=False, seed=16)
    y = random_logits(200, 50, spread=2.0, truncated=False, seed=17)
    p, q = torch.from_numpy(z).softmax(-1), torch.from_numpy(y).softmax(-1)
    for rule in ("published", "reference", "augmented"):
        rates = [torch.minimum(q, RULES[rule].augment(p, q, eta)).sum(-1).mean() for eta in (0.0, 5.0, 20.0)]
        assert all(lower + 0.02 < higher for lower, higher in pairwise(rates)), rule
    assert torch.equal(RULES["lossless"].augment(p, q, 20.0), p)
