"""A draft token's q is the warped distribution's k likeliest tokens, found without warping the vocabulary."""

import pytest
import torch

from rapid.sampling.noise import Noise, Purpose
from rapid.sampling.params import SamplingParams
from rapid.sampling.row_params import RowParams
from rapid.sampling.sampler import probabilities
from rapid.speculation.drawing import draw, draw_greedily

K = 16
CASES = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature in (0.3, 1.0)
    for top_k in (0, 5, 16)
    for top_p in (1.0, 0.9, 0.2, 1e-6)
    for min_p in (0.0, 0.1)
]


def keys(num: int) -> torch.Tensor:
    return Noise(torch.tensor(3)).keys(Purpose.DRAFT, torch.arange(num))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("size", [10, 2000])
def test_q_is_the_warped_distribution_cut_to_its_likeliest(size: int, listed: bool) -> None:
    """All cases as rows of one batch; with ``listed`` the columns are tokens in another order."""
    logits = 3 * torch.randn(len(CASES), size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    ids = (
        torch.stack([torch.randperm(50_000)[:size] for _ in CASES]) if listed else torch.arange(size).expand_as(logits)
    )
    drawn = draw(logits, RowParams.of(CASES, logits.device), K, keys(len(CASES)), ids if listed else None)
    for i, params in enumerate(CASES):
        expected, columns = probabilities(logits[i], params).topk(min(K, size))
        inside = drawn.weights[i] > 0
        assert set(drawn.ids[i, inside].tolist()) == set(ids[i, columns[expected > 0]].tolist())
        torch.testing.assert_close(drawn.weights[i, inside], (expected / expected.sum())[expected > 0])
        assert drawn.tokens[i] in drawn.ids[i, inside]
        column = int((ids[i] == drawn.tokens[i]).nonzero())
        torch.testing.assert_close(drawn.confidences[i], logits[i].softmax(-1)[column])


def test_the_drawn_tokens_follow_q() -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=0.8, top_p=0.7)
    drawn = draw(logits.expand(50_000, -1), RowParams.of([params], logits.device), 8, keys(50_000))
    for token, weight in zip(drawn.ids[0].tolist(), drawn.weights[0].tolist(), strict=True):
        assert abs((drawn.tokens == token).float().mean() - weight) < 0.01


def test_greedy_drafts_are_the_likeliest_of_the_listed_tokens() -> None:
    logits, ids = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 1.0]]), torch.tensor([[70, 80, 90], [7, 8, 9]])
    drawn = draw_greedily(logits, ids)
    assert drawn.tokens.tolist() == [80, 7] and drawn.ids.shape == (2, 0)
    torch.testing.assert_close(drawn.confidences, logits.softmax(-1).amax(-1))
