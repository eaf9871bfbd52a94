"""The random numbers are uniform, independent of each other, and of nothing but what names them."""

import itertools

import torch

from rapid.sampling.noise import Noise, Purpose, exponential, uniform


def numbers(seeds: torch.Tensor, purpose: Purpose, start: int, steps: torch.Tensor) -> torch.Tensor:
    return uniform(Noise(seeds, start).keys(purpose, steps))


def test_neighbouring_seeds_positions_and_purposes_have_uniform_independent_numbers() -> None:
    """Mean, variance, a fine histogram, and the correlation with each neighbour, of 400 seeds and 500 positions."""
    seeds, steps = torch.arange(-200, 200), torch.arange(500)
    drawn = torch.stack([numbers(seeds, purpose, 7, steps) for purpose in Purpose])  # [purposes, seeds, positions]
    assert drawn.unique().numel() == drawn.numel() == 600_000
    assert abs(drawn.mean() - 1 / 2) < 0.002
    assert abs(drawn.var() - 1 / 12) < 0.001
    counts = torch.histc(drawn.float(), 1000, 0, 1)
    assert ((counts - 600).square() / 600).sum() < 999 + 5 * (2 * 999) ** 0.5
    for dimension in range(3):
        ours = drawn.narrow(dimension, 1, drawn.shape[dimension] - 1)
        theirs = drawn.narrow(dimension, 0, drawn.shape[dimension] - 1)
        assert abs(torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1]) < 0.01


def test_tokens_have_exponential_independent_numbers() -> None:
    keys = Noise(torch.arange(100)).keys(Purpose.NEXT, torch.zeros(1, dtype=torch.long)).squeeze(-1)
    drawn = exponential(keys, torch.arange(5000))
    assert abs(drawn.mean() - 1) < 0.01
    assert abs(drawn.var() - 1) < 0.02
    for ours, theirs in ((drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1]) < 0.01
    assert torch.equal(exponential(keys, torch.tensor([17, 4321])), drawn[:, [17, 4321]])


def test_a_number_goes_by_the_position_however_it_is_reached() -> None:
    """After a rollback, on another engine, or in another round: acceptance and the next token at a position stay."""
    seed = torch.tensor(5)
    for purpose in (Purpose.ACCEPT, Purpose.NEXT):
        expected = numbers(seed, purpose, 0, torch.arange(20))
        assert torch.equal(numbers(seed, purpose, 13, torch.arange(7)), expected[13:])
        each_its_own = Noise(seed.expand(2), torch.tensor([13, 2])).keys(purpose, torch.arange(7))
        assert torch.equal(uniform(each_its_own), torch.stack([expected[13:], expected[2:9]]))


def test_no_two_rounds_share_a_draft_s_numbers() -> None:
    """A discarded draft may have had a say in what is drafted next, so its numbers must not come again."""
    seed = torch.tensor(5)
    drafts = [numbers(seed, Purpose.DRAFT, start, torch.arange(9)) for start in range(8)]
    for one, other in itertools.combinations(drafts, 2):
        assert not set(one.tolist()) & set(other.tolist())


def test_any_64_bits_are_a_seed_of_their_own() -> None:
    seeds = torch.tensor([-(2**63), -1, 0, 1, 2**63 - 1])
    assert numbers(seeds, Purpose.NEXT, 2**31 - 10, torch.arange(5)).unique().numel() == 25
