"""Warping is transformers' warping, and what is drawn is what the distribution says."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rapid.errors import InvalidRequest
from rapid.sampling.noise import Noise, Purpose, uniform
from rapid.sampling.params import SamplingParams
from rapid.sampling.sampler import first_to_come, probabilities, sample


def by_transformers(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(None, logits).softmax(-1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_warping_equals_transformers(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = 3 * torch.randn(50, 101, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ours, theirs = probabilities(logits, params), by_transformers(logits, params)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert torch.equal(ours > 0, theirs > 0)


def test_rows_are_warped_alone_whatever_the_leading_dimensions() -> None:
    logits = torch.randn(2, 3, 17, generator=torch.Generator().manual_seed(2))
    params = SamplingParams(temperature=0.7, top_k=9, top_p=0.8, min_p=0.02)
    batched = probabilities(logits, params)
    alone = torch.stack([torch.stack([probabilities(row, params) for row in rows]) for rows in logits])
    torch.testing.assert_close(batched, alone)


def test_greedy_is_one_hot_at_the_argmax() -> None:
    logits = torch.randn(20, 33, generator=torch.Generator().manual_seed(3))
    probs = probabilities(logits, SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.5))
    assert torch.equal(probs, torch.nn.functional.one_hot(logits.argmax(-1), 33).float())


@pytest.mark.parametrize("temperature", [1e-5, 1e-20, 1e-40, 1e-300, math.ulp(0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tiny_temperature_is_greedy_and_finite(temperature: float, dtype: torch.dtype) -> None:
    logits = 100 * torch.randn(8, 33, generator=torch.Generator().manual_seed(4), dtype=dtype)
    for params in (SamplingParams(temperature=temperature), SamplingParams(temperature=temperature, top_p=0.9)):
        probs = probabilities(logits, params)
        torch.testing.assert_close(probs, probabilities(logits, SamplingParams(temperature=0)))


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("temperature", [-0.1, 10.1, math.nan, math.inf]),
        ("top_p", [0.0, -1.0, 1.01, math.nan]),
        ("top_k", [-1]),
        ("min_p", [-0.01, 1.01, math.nan]),
        ("seed", [2**63, -(2**63) - 1]),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(param: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest, match=param) as caught:
            SamplingParams(**{param: value})
        assert caught.value.param == param
        assert repr(value) in caught.value.message


def test_the_limits_themselves_are_allowed() -> None:
    SamplingParams(temperature=0, top_p=1, top_k=0, min_p=0, seed=2**63 - 1)
    SamplingParams(temperature=10, top_p=1e-9, top_k=10**9, min_p=1, seed=-(2**63))


def keys(*shape: int, seed: int = 0) -> torch.Tensor:
    """Keys of that many requests, each with a seed of its own."""
    seeds = seed * 10**6 + torch.arange(math.prod(shape)).view(shape)
    return Noise(seeds).keys(Purpose.NEXT, torch.zeros(1, dtype=torch.long)).squeeze(-1)


def test_sampling_never_draws_probability_0_and_follows_the_rest() -> None:
    probs = torch.tensor([0.0, 0.6, 0.0, 0.3, 0.1, 0.0])
    drawn = sample(probs.expand(4, 50_000, 6), keys(4, 50_000))
    assert drawn.shape == (4, 50_000)
    shares = torch.bincount(drawn.flatten(), minlength=6) / drawn.numel()
    assert shares[probs == 0].sum() == 0
    torch.testing.assert_close(shares, probs, rtol=0, atol=0.005)


@pytest.mark.parametrize("bits", [0, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_ends_of_the_random_numbers_draw_tokens_that_can_be(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest and the largest number are inside (0, 1); also where the row does not sum to 1, in many blocks."""
    some = keys(2)
    monkeypatch.setattr("rapid.sampling.noise._mix", lambda counter: torch.full_like(counter, bits))
    assert 0 < uniform(some).min() <= uniform(some).max() < 1
    for size in (5, 200):
        for scale in (1e-6, 0.1, 1.0, 3.0):
            probs = torch.zeros(2, size, dtype=dtype)
            probs[0, -4], probs[0, -2], probs[1, -3] = 0.6 * scale, 0.4 * scale, scale
            assert sample(probs, some).tolist() == [size - 4, size - 3]


def test_a_large_vocabulary_is_drawn_from_as_its_weights_say() -> None:
    """Rare tokens behind a hundred thousand others are neither lost nor favoured."""
    probs = torch.full((100_000,), 1e-6)
    probs[-3:] = torch.tensor([0.5, 0.0, 0.4])
    drawn = sample(probs.expand(400, -1), keys(400))
    shares = torch.bincount(drawn, minlength=100_000) / 400
    torch.testing.assert_close(shares[-3:], probs[-3:], rtol=0, atol=0.08)
    assert shares[-2] == 0
    assert 0.05 < shares[:-3].sum() < 0.16


@pytest.mark.parametrize("size", [63, 64, 65, 128, 200])
def test_every_token_of_every_block_has_its_probability(size: int) -> None:
    """The last block may be short. Chi-square with 5 standard deviations of room."""
    probs = torch.rand(size, generator=torch.Generator().manual_seed(8)).square()
    expected = 200_000 * probs.double() / probs.double().sum()
    observed = torch.bincount(sample(probs.expand(200_000, size), keys(200_000)), minlength=size)
    likely = expected > 5
    statistic = ((observed - expected)[likely].square() / expected[likely]).sum()
    assert statistic < likely.sum() + 5 * (2 * likely.sum()) ** 0.5


def test_a_few_tokens_are_drawn_as_their_weights_say_in_any_order() -> None:
    weights, ids = torch.tensor([0.5, 0.0, 0.2, 0.3]), torch.tensor([7, 3, 99_000, 1])
    drawn = ids[first_to_come(weights.expand(100_000, 4), ids.expand(100_000, 4), keys(100_000)).squeeze(-1)]
    for token, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        assert abs((drawn == token).float().mean() - weight) < 0.01
    order = torch.tensor([2, 0, 3, 1])
    again = first_to_come(weights[order].expand(100_000, 4), ids[order].expand(100_000, 4), keys(100_000))
    assert torch.equal(drawn, ids[order][again.squeeze(-1)])


def test_the_same_key_draws_the_same() -> None:
    probs = torch.rand(100, 50, generator=torch.Generator().manual_seed(6))
    first, again, other = (sample(probs, keys(100, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_little_noise_in_all_logits_changes_few_draws() -> None:
    """Noise of 0.02 turns at most 3% of draws into other tokens. Inverting the cumulated distribution: a third."""
    logits = 3 * torch.randn(49_152, generator=torch.Generator().manual_seed(9))
    changed = 0
    for draw in range(400):
        noise = 0.02 * torch.randn(49_152, generator=torch.Generator().manual_seed(draw))
        drawn = sample(torch.stack([logits, logits + noise]).softmax(-1), keys(1, seed=draw).expand(2))
        changed += int(drawn[0] != drawn[1])
    assert changed <= 12
