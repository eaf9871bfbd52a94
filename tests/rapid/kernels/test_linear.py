"""Products with dense and quantised weights: how far they may be off, for few rows and many."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rapid.errors import ModelFileError
from rapid.kernels import linear
from rapid.kernels.linear import check_scheme, make_linear

OUT, IN, GROUP = 48, 96, 32
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 50)  # every tile of the kernels, and several
SCHEMES = ("none", "int8", "int4")
ROUNDING = 2**-8  # of a bfloat16, and of what quantised weights are scaled with


def random(*shape: int, seed: int = 0) -> Tensor:
    """In bfloat16, which is what the CPU's kernels multiply."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def in_steps(*shape: int, seed: int = 0) -> Tensor:
    """Rows that eight bits hold exactly: 127 steps in each group of inputs."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-127, 128, (*shape[:-1], shape[-1] // GROUP, GROUP), generator=generator)
    steps[..., 0] = 127
    return (steps / 32).flatten(-2).bfloat16()


def exact(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(rows.double(), weight.double(), None if bias is None else bias.double())


def worst_error(weight: Tensor, scheme: str) -> Tensor:
    """By how much each weight may be off: half a step, which is a 127th of a row or a 15th of a group's range."""
    if scheme == "int8":
        return (weight.abs().amax(1, keepdim=True) / 127 / 2).expand_as(weight)
    groups = weight.view(len(weight), -1, GROUP)
    return ((groups.amax(-1) - groups.amin(-1)) / 15 / 2).repeat_interleave(GROUP, 1)


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_weights_are_off_by_half_a_step_at_most(scheme: str, with_bias: bool, num_rows: int) -> None:
    weight, rows = random(OUT, IN), random(num_rows, IN, seed=1)
    bias = random(OUT, seed=2) if with_bias else None
    error = (make_linear(weight, bias, scheme)(rows).double() - exact(rows, weight, bias)).abs()
    bound = rows.double().abs() @ (worst_error(weight.double(), scheme) + weight.double().abs() * ROUNDING).T
    assert (error <= bound + 0.1).all()
    assert error.mean() < bound.mean() / 4  # errors of either sign cancel
    assert error.max() > 0.001


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(OUT, IN), (64, 576), (40, 80), (33, 17)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_weights_are_exact(dtype: torch.dtype, shape: tuple[int, int], with_bias: bool, num_rows: int) -> None:
    """Up to one rounding; also shapes that are no multiple of what a kernel takes at a time."""
    weight, rows = random(*shape).to(dtype), random(num_rows, shape[1], seed=1).to(dtype)
    bias = random(shape[0], seed=2).to(dtype) if with_bias else None
    output = make_linear(weight, bias, "none")(rows)
    assert output.dtype == dtype and output.shape == (num_rows, shape[0])
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2 * ROUNDING, "atol": 0.1}
    torch.testing.assert_close(output.double(), exact(rows, weight, bias), **tolerance)


@pytest.mark.parametrize("is_head", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_few_rows_and_many_are_multiplied_with_the_same_weights(scheme: str, is_head: bool) -> None:
    product = make_linear(random(OUT, IN), random(OUT, seed=2), scheme, is_head=is_head)
    rows = in_steps(50, IN, seed=1)  # some kernels round rows to eight bits, and some do not
    for size in (1, 3, 5):
        few = torch.cat([product(part) for part in rows.split(size)])
        torch.testing.assert_close(product(rows), few, rtol=2 * ROUNDING, atol=0.12)  # rows are 2.3 times as long


@pytest.mark.parametrize("num_rows", ROWS)
def test_int4_keeps_weights_that_were_int4_before(num_rows: int) -> None:
    """Those of a Q4_1 file: 16 steps from a minimum, per 32 weights; here with steps that bfloat16 has."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(16, (OUT, IN // GROUP, GROUP), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15
    steps, lowest = torch.randint(1, 8, (2, OUT, IN // GROUP, 1), generator=generator) / 16
    weight = (codes * steps - lowest).view(OUT, IN).bfloat16()
    rows = in_steps(num_rows, IN, seed=1)
    output = make_linear(weight, None, "int4")(rows).double()
    torch.testing.assert_close(output, exact(rows, weight, None), rtol=ROUNDING, atol=1e-3)


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_equal_weights_stay_what_they_are(scheme: str, num_rows: int) -> None:
    """A range of nothing must not be divided by."""
    weight, rows = torch.full((OUT, IN), 0.75).bfloat16(), in_steps(num_rows, IN, seed=1)
    weight[::2] = 0
    output = make_linear(weight, None, scheme)(rows).double()
    torch.testing.assert_close(output, exact(rows, weight, None), rtol=2 * ROUNDING, atol=1e-3)


@pytest.mark.parametrize("num_rows", ROWS)
def test_rows_beside_int4_weights_are_off_by_half_of_an_8_bit_step_at_most(num_rows: int) -> None:
    """With weights that four bits hold exactly; a group of zeros, and one of tiny numbers, among them."""
    codes = torch.randint(16, (OUT, IN // GROUP, GROUP), generator=torch.Generator().manual_seed(3))
    codes[..., 0], codes[..., 1] = 0, 15
    weight, rows = (codes - 7.0).view(OUT, IN).bfloat16(), random(num_rows, IN, seed=1)
    rows[0, :GROUP], rows[-1, GROUP : 2 * GROUP] = 0, 1e-20
    output, expected = make_linear(weight, None, "int4")(rows).double(), exact(rows, weight, None)
    steps = rows.double().view(num_rows, -1, GROUP).abs().amax(-1) / 127
    bound = steps.repeat_interleave(GROUP, 1) / 2 @ weight.double().abs().T
    error = (output - expected).abs()
    assert (error <= bound + expected.abs() * ROUNDING).all()
    assert 0 < error.mean() < bound.mean() / 4


def test_the_head_gets_eight_bits() -> None:
    weight, rows = random(OUT, IN), random(3, IN, seed=1)
    eight = make_linear(weight, None, "int8")(rows)
    assert torch.equal(make_linear(weight, None, "int4", is_head=True)(rows), eight)
    assert not torch.equal(make_linear(weight, None, "int4")(rows), eight)


@pytest.mark.parametrize(("scheme", "device"), [("fp8", "cpu"), ("int3", "cpu"), ("int3", "cuda"), ("int8", "mps")])
def test_a_scheme_that_a_device_does_not_have_is_refused(scheme: str, device: str) -> None:
    with pytest.raises(ModelFileError, match=f"'{scheme}' is not for {device}; there: none"):
        check_scheme(scheme, torch.device(device), torch.bfloat16)


def test_without_llvm_dense_weights_are_multiplied_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "available", lambda: False)
    weight, rows = random(OUT, IN), random(3, IN, seed=1)
    output = make_linear(weight, None, "none")(rows).double()
    torch.testing.assert_close(
        output, exact(rows, weight, None), rtol=2 * ROUNDING, atol=0.12
    )  # rows are 2.3 times as long
    with pytest.raises(ModelFileError, match="pip install llvmlite"):
        check_scheme("int8", torch.device("cpu"), torch.bfloat16)


def test_rows_that_quantised_products_would_misread_are_refused() -> None:
    check_scheme("none", torch.device("cpu"), torch.float32)
    with pytest.raises(ModelFileError, match="multiplies bfloat16: leave dtype at auto"):
        check_scheme("int4", torch.device("cpu"), torch.float32)
