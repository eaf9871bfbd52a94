"""The search for the lowest kept probability keeps what sorting the vocabulary keeps, ties included."""

from dataclasses import replace

import pytest
import torch

from benchmarks.common import sorted_sampling as reference
from rapid.kernels.cpu.jit import available
from rapid.sampling.params import SamplingParams
from rapid.sampling.row_params import RowParams, truncates
from rapid.sampling.sampler import probabilities, warp, warp_to_few
from rapid.sampling.truncation import by_sorting, truncate

CASES = [
    SamplingParams(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    for top_k in (0, 50, 3000)
    for top_p in (1.0, 0.9, 0.3, 1e-6)
    for min_p in (0.0, 0.05)
]


@pytest.mark.parametrize("size", [1, 50, 4099, 9024])
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
@pytest.mark.parametrize("rounded", [False, True])
def test_the_kept_tokens_are_those_of_the_reference(size: int, spread: float, rounded: bool) -> None:
    """Flat and peaked rows of any size; logits rounded to bfloat16 are equal in their hundreds.

    Where a sum meets the target to rounding, one token more or less may be kept.
    """
    logits = spread * torch.randn(3, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    logits = logits.bfloat16().double() if rounded else logits
    for params in CASES:
        expected = reference.probabilities(logits, params)
        torch.testing.assert_close(probabilities(logits, params), expected, rtol=0, atol=1e-12)
        single = probabilities(logits.float(), params) > 0
        assert ((single != (expected > 0)).sum(-1) <= 1).all()


@pytest.mark.parametrize("params", CASES)
def test_other_devices_keep_the_same(params: SamplingParams) -> None:
    logits = 3 * torch.randn(4, 700, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    probs = logits.bfloat16().double().softmax(-1)
    rows = RowParams.of([params], probs.device)
    torch.testing.assert_close(by_sorting(probs, rows), truncate(probs.clone(), rows), rtol=0, atol=1e-12)


def test_rows_with_parameters_of_their_own_are_each_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, which searches row by row, and as other devices do it, which sort all rows at once."""
    logits = 3 * torch.randn(len(CASES), 700, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    params = [replace(case, temperature=0.3 + 0.1 * i) for i, case in enumerate(CASES)]
    alone = torch.stack([probabilities(row, its) for row, its in zip(logits, params, strict=True)])
    rows = RowParams.of(params, logits.device)
    assert torch.equal(warp(logits, rows), alone)
    monkeypatch.setattr("rapid.sampling.sampler.truncate", by_sorting)
    torch.testing.assert_close(warp(logits, rows), alone, rtol=0, atol=1e-12)


def test_equal_tokens_are_kept_up_to_the_share() -> None:
    """Those with the larger ids."""
    for size, share in ((8192, 0.25), (100, 0.5)):
        params = RowParams.of([SamplingParams(top_p=share)], torch.device("cpu"))
        probs = truncate(torch.full((1, size), 1 / size, dtype=torch.float64), params)
        assert (probs > 0).sum() == size * share
        assert (probs[0, -int(size * share) :] > 0).all()


@pytest.mark.skipif(not available(), reason="this machine compiles no kernels")
@pytest.mark.parametrize("spread", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("rounded", [False, True])
def test_a_kernel_finds_the_few_that_are_kept(spread: float, rounded: bool) -> None:
    """The same tokens and probabilities, or it says that they are not few."""
    logits = spread * torch.randn(4, 4096, generator=torch.Generator().manual_seed(3))
    logits = logits.bfloat16().float() if rounded else logits
    found = 0
    for params in CASES:
        few = warp_to_few(logits, RowParams.of([params], logits.device))
        expected = probabilities(logits, params)
        if few is None:
            assert params.top_k == 3000 or not truncates(params, 4096) or (expected > 0).sum(-1).max() >= 63
            continue
        found += 1
        ids, probs = few
        dense = torch.zeros_like(logits).scatter_add_(-1, ids, probs)
        assert ((dense > 0) != (expected > 0)).sum(-1).max() <= 1  # where a sum meets the share to rounding
        assert (((dense > 0) != (expected > 0)).sum(-1) == 0).float().mean() >= 0.75
        torch.testing.assert_close(dense, expected, rtol=2e-2, atol=2e-3)
    assert found >= (6 if spread == 1 else 14)


@pytest.mark.skipif(not available(), reason="this machine compiles no kernels")
def test_rows_that_keep_few_have_parameters_of_their_own() -> None:
    logits = 5 * torch.randn(3, 4096, generator=torch.Generator().manual_seed(4))
    rows = [SamplingParams(temperature=0.5, top_k=5), SamplingParams(top_p=0.5), SamplingParams(min_p=0.2)]
    few = warp_to_few(logits, RowParams.of(rows, logits.device))
    assert few is not None
    for i, params in enumerate(rows):
        expected = probabilities(logits[i], params)
        torch.testing.assert_close(torch.zeros(4096).scatter_add_(0, few[0][i], few[1][i]), expected)
    assert warp_to_few(logits, RowParams.of([*rows[:2], SamplingParams(top_k=64)], logits.device)) is None
    assert warp_to_few(logits[:, :4095], RowParams.of(rows, logits.device)) is None
