"""Products with dense and quantised weights: how far they may be off, and that both ways of computing them agree."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rapid.errors import ModelFileError
from rapid.linear import check_scheme, make_linear

OUT, IN, GROUP = 48, 96, 32
FEW, MANY = 3, 50  # rows, on either side of where the kernel changes
SCHEMES = ("none", "int8", "int4")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def worst_error(weight: Tensor, scheme: str) -> Tensor:
    """By how much each weight may be off: half a step, which is a 127th of a row or a 15th of a group's range."""
    if scheme == "int8":
        return (weight.abs().amax(1, keepdim=True) / 127 / 2).expand_as(weight)
    groups = weight.view(len(weight), -1, GROUP)
    return ((groups.amax(-1) - groups.amin(-1)) / 15 / 2).repeat_interleave(GROUP, 1)


@pytest.mark.parametrize("num_rows", [FEW, MANY])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_weights_are_off_by_half_a_step_at_most(scheme: str, with_bias: bool, num_rows: int) -> None:
    weight, rows = random(OUT, IN), random(num_rows, IN, seed=1)
    bias = random(OUT, seed=2) if with_bias else None
    error = (make_linear(weight, bias, scheme)(rows) - F.linear(rows, weight, bias)).abs()
    bound = rows.abs() @ worst_error(weight, scheme).T
    assert (error <= bound + 1e-4).all()
    assert error.mean() < bound.mean() / 4  # errors of either sign cancel
    assert error.max() > 0.001


@pytest.mark.parametrize("num_rows", [1, FEW, MANY])
@pytest.mark.parametrize("with_bias", [False, True])
def test_dense_weights_are_exact(with_bias: bool, num_rows: int) -> None:
    weight, rows = random(OUT, IN), random(num_rows, IN, seed=1)
    bias = random(OUT, seed=2) if with_bias else None
    torch.testing.assert_close(make_linear(weight, bias, "none")(rows), F.linear(rows, weight, bias))


@pytest.mark.parametrize("is_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_few_rows_and_many_are_multiplied_with_the_same_weights(scheme: str, dtype: torch.dtype, is_head: bool) -> None:
    product = make_linear(random(OUT, IN).to(dtype), random(OUT, seed=2).to(dtype), scheme, is_head=is_head)
    rows = random(MANY, IN, seed=1).to(dtype)
    many, few = product(rows), torch.cat([product(part) for part in rows.split(FEW)])
    assert many.dtype == few.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 0.3  # of sums up to 30, which are rounded to 0.125
    torch.testing.assert_close(many, few, rtol=0, atol=tolerance)


@pytest.mark.parametrize("num_rows", [FEW, MANY])
def test_int4_keeps_weights_that_were_int4_before(num_rows: int) -> None:
    """Those of a Q4_1 file: 16 steps from a minimum, per 32 weights."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(16, (OUT, IN // GROUP, GROUP), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15
    scales, lowest = torch.rand(2, OUT, IN // GROUP, 1, generator=generator)
    weight = (codes * (scales + 0.01) - lowest).view(OUT, IN)
    rows = random(num_rows, IN, seed=1)
    torch.testing.assert_close(make_linear(weight, None, "int4")(rows), F.linear(rows, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_rows", [FEW, MANY])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_equal_weights_stay_what_they_are(scheme: str, num_rows: int) -> None:
    """A range of nothing must not be divided by."""
    weight, rows = torch.full((OUT, IN), 0.75), random(num_rows, IN, seed=1)
    weight[::2] = 0
    torch.testing.assert_close(make_linear(weight, None, scheme)(rows), F.linear(rows, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("out", "size", "is_head"), [(OUT, IN, True), (OUT, 80, False), (40, IN, False)])
def test_the_head_and_odd_shapes_get_eight_bits(out: int, size: int, is_head: bool) -> None:
    weight, rows = random(out, size), random(FEW, size, seed=1)
    eight = make_linear(weight, None, "int8")(rows)
    assert torch.equal(make_linear(weight, None, "int4", is_head=is_head)(rows), eight)


@pytest.mark.parametrize(("scheme", "device"), [("fp8", "cpu"), ("int3", "cpu"), ("int3", "cuda"), ("int8", "mps")])
def test_a_scheme_that_a_device_does_not_have_is_refused(scheme: str, device: str) -> None:
    with pytest.raises(ModelFileError, match=f"'{scheme}' is not for {device}; there: none"):
        check_scheme(scheme, torch.device(device))


def test_what_is_missing_for_a_scheme_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    check_scheme("none", torch.device("cuda"))
    with pytest.raises(ModelFileError, match="pip install torchao"):
        check_scheme("int8", torch.device("cuda"))
