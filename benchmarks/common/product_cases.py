"""Cases of products with packed weights, and how far a kernel's answer is from float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from rapid.kernels.cuda.low_bit import GROUP, Packed, multiply_rows, pack, plain_weight


@dataclass(frozen=True)
class Case:
    """``num_rows`` rows times a weight in ``scheme``; ``num_sms`` decides how its inputs are split."""

    scheme: str
    num_rows: int
    num_outputs: int = 200
    num_inputs: int = 640
    group: int = GROUP
    dtype: torch.dtype = torch.float32
    with_bias: bool = True
    num_sms: int = 4


def error(case: Case) -> float:
    """The largest distance of `multiply_rows` from float64, over the largest number; NaN if a number is NaN."""
    rows, bias = inputs(case)
    output = multiply_rows(rows, packed_weight(case), bias, case.num_sms)
    expected = exact(case)
    assert output.shape == expected.shape and output.dtype == case.dtype
    return ((output.double() - expected).abs().max() / expected.abs().max()).item()


def exact(case: Case) -> Tensor:
    """The product of the rounded weight in float64."""
    rows, bias = inputs(case)
    product = rows.double() @ plain_weight(packed_weight(case), torch.float32).double().T
    return product if bias is None else product + bias.double()


def inputs(case: Case) -> tuple[Tensor, Tensor | None]:
    """Rows, and a bias; the rows of few are the first of many."""
    rows = _random(1, 256, case.num_inputs)[: case.num_rows].to(case.dtype)
    return rows, _random(2, case.num_outputs).to(case.dtype) if case.with_bias else None


def packed_weight(case: Case) -> Packed:
    return _packed(case.scheme, case.num_outputs, case.num_inputs, case.group)


@functools.cache
def _packed(scheme: str, num_outputs: int, num_inputs: int, group: int) -> Packed:
    return pack(_random(3, num_outputs, num_inputs), scheme, group)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
