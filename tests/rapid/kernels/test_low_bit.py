"""Packed weights keep what they stand for, and the Triton kernels multiply them as float64 does."""

import importlib.util
import logging
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import product_cases
from benchmarks.common.product_cases import Case, error, exact, inputs, packed_weight
from rapid.kernels.cuda import low_bit
from rapid.kernels.cuda.low_bit import (
    MOST_ROWS,
    SCHEMES,
    LowBitLinear,
    fault,
    low_bit_linear,
    multiply_rows,
    pack,
    plain_weight,
    unpacked,
)
from rapid.kernels.linear import check_scheme

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="runs in Triton's interpreter: make test-triton",
)
EXACT = 1e-6  # float32
ROUNDED = 2e-3  # float16: weights are rounded to it, too
CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@interpreted
@pytest.mark.parametrize("num_rows", [0, 1, 2, 5, 16, 17, 33, 64, MOST_ROWS])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_few_rows(scheme: str, num_rows: int) -> None:
    if num_rows == 0:
        case = Case(scheme, 0)
        assert multiply_rows(*_operands(case)).shape == (0, case.num_outputs)
    else:
        assert error(Case(scheme, num_rows)) < EXACT


def _operands(case: Case) -> tuple[Tensor, low_bit.Packed, Tensor | None, int]:
    rows, bias = inputs(case)
    return rows, packed_weight(case), bias, case.num_sms


@interpreted
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (1, 128), (65, 192), (200, 17), (63, 1000)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_shapes_that_fill_no_panel_and_no_block(scheme: str, shape: tuple[int, int], with_bias: bool) -> None:
    assert error(Case(scheme, 3, *shape, with_bias=with_bias)) < EXACT


@interpreted
@pytest.mark.parametrize("group", [32, 64, 128])
def test_groups_of_four_bits(group: int) -> None:
    for num_inputs in (group, 6 * group, 7 * group):
        assert error(Case("int4", 5, num_inputs=num_inputs, group=group)) < EXACT


@interpreted
@pytest.mark.parametrize("scheme", SCHEMES)
def test_in_16_bits(scheme: str) -> None:
    """Triton's interpreter multiplies bfloat16's bits as integers (triton issue 11584)."""
    for num_rows in (1, 17):
        assert error(Case(scheme, num_rows, dtype=torch.float16)) < ROUNDED


@interpreted
@pytest.mark.parametrize("num_sms", [1, 3, 132])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_part_some_and_as_many_as_there_may_be(scheme: str, num_sms: int) -> None:
    assert error(Case(scheme, 2, num_outputs=72, num_inputs=2000, num_sms=num_sms)) < EXACT


@interpreted
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_is_the_same_in_every_batch(scheme: str) -> None:
    """To the bit: for a size of program here, where NumPy adds in an order that depends on it."""
    case = Case(scheme, MOST_ROWS, num_inputs=1024)
    rows, packed, bias, num_sms = _operands(case)
    many = multiply_rows(rows, packed, bias, num_sms)
    assert torch.equal(multiply_rows(rows[:40], packed, bias, num_sms), many[:40])
    one = multiply_rows(rows[:1], packed, bias, num_sms)
    assert torch.equal(multiply_rows(rows[:16], packed, bias, num_sms)[:1], one)
    torch.testing.assert_close(one, many[:1], rtol=1e-5, atol=1e-4)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(200, 640), (65, 100)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_written_out_for_many_rows(scheme: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    case = Case(scheme, MOST_ROWS + 1, *shape, dtype=dtype)
    rows, packed, bias, _ = _operands(case)
    plain = plain_weight(packed, dtype)
    # The interpreter's multiplication and addition round one after the other; 15 steps are at most 6.
    tolerance = {"rtol": ROUNDED, "atol": 6 * 2**-10} if dtype == torch.float16 else {"rtol": EXACT, "atol": EXACT}
    torch.testing.assert_close(unpacked(packed, dtype), plain, **tolerance)
    output = LowBitLinear(packed, bias)(rows).double()
    expected = exact(case)
    bound = EXACT if dtype == torch.float32 else ROUNDED
    assert (output - expected).abs().max() < bound * expected.abs().max()


@interpreted
def test_the_distance_shows_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would prove nothing."""
    monkeypatch.setattr(product_cases, "plain_weight", lambda *args: plain_weight(*args).roll(1, 1))
    for scheme in SCHEMES:
        assert error(Case(scheme, 3)) > 0.1


@interpreted
def test_rows_may_lie_apart() -> None:
    case = Case("int4", 3)
    rows, packed, bias, num_sms = _operands(case)
    wide = torch.full((3, 2 * case.num_inputs), torch.nan)
    wide[:, : case.num_inputs] = rows
    expected = multiply_rows(rows, packed, bias, num_sms)
    assert torch.equal(multiply_rows(wide[:, : case.num_inputs], packed, bias, num_sms), expected)
    assert torch.equal(multiply_rows(rows.T.contiguous().T, packed, bias, num_sms), expected)


@interpreted
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_probe_at_load_finds_no_fault(scheme: str) -> None:
    assert fault(scheme, CPU, torch.float32) is None
    assert fault(scheme, CPU, torch.float16) is None
    assert isinstance(low_bit_linear(random(70, 64), None, scheme), LowBitLinear)


# What follows needs no Triton


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_is_off_by_half_a_step_at_most(scheme: str) -> None:
    weight = random(130, 200).bfloat16()
    distance = (plain_weight(pack(weight, scheme), torch.float32) - weight.float()).abs()
    largest = weight.float().abs().amax(1, keepdim=True)
    if scheme == "int4":
        groups = F.pad(weight.float(), (0, 56)).view(130, -1, 64)
        step = (groups.amax(-1) - groups.amin(-1)) / 15
        # The scale and the offset are bfloat16, so the ends of the range move by a little.
        bound = (step * 0.5 + groups.abs().amax(-1) * 2**-7).repeat_interleave(64, 1)[:, :200]
    elif scheme == "int8":
        bound = largest / 127 * 0.501
    else:  # three bits behind the point, down to 2⁻⁶ of 448
        bound = (weight.float().abs() * 2**-4).clamp_min(largest / 448 * 2**-10) * 1.001
    assert (distance <= bound).all() and distance.max() > 0


def test_weights_that_were_int4_before_stay_what_they_are() -> None:
    codes = torch.randint(16, (70, 4, 64), generator=torch.Generator().manual_seed(3))
    codes[..., 0], codes[..., 1] = 0, 15
    steps = torch.randint(1, 8, (2, 70, 4, 1), generator=torch.Generator().manual_seed(4)) / 16
    weight = (codes * steps[0] - steps[1]).flatten(1)
    assert torch.equal(plain_weight(pack(weight, "int4"), torch.float32), weight)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_that_are_all_equal_stay_what_they_are(scheme: str) -> None:
    weight = torch.full((5, 64), 0.75)
    weight[::2] = 0
    torch.testing.assert_close(plain_weight(pack(weight, scheme), torch.float32), weight, rtol=1e-6, atol=1e-30)


def test_a_large_weight_is_packed_piece_by_piece_and_has_the_bytes_that_it_should() -> None:
    weight = random(low_bit._AT_ONCE + 70, 128)
    for scheme, bytes_a_weight in (("int8", 1.0), ("fp8", 1.0), ("int4", 0.5625)):
        packed = pack(weight, scheme)
        assert torch.equal(
            plain_weight(packed, torch.float32)[-70:], plain_weight(pack(weight[-70:], scheme), torch.float32)
        )
        assert packed.num_bytes / (packed.num_panels * low_bit.PANEL * 128) == pytest.approx(bytes_a_weight, abs=0.04)


@pytest.mark.parametrize(("shape", "parts"), [((4096, 4096), 8), ((28672, 4096), 1), ((6144, 4096), 5), ((64, 128), 1)])
def test_small_weights_are_split_until_the_device_is_full(shape: tuple[int, int], parts: int) -> None:
    packed = pack(torch.zeros(shape, device="meta"), "int8")
    assert -(-packed.num_blocks // packed.blocks_per_part(132)) == parts


def test_a_kernel_that_fails_or_is_wrong_is_named_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weight, rows, bias = random(70, 64), random(3, 64, seed=1), random(70, seed=2)

    def broken(*_: object) -> Tensor:
        raise RuntimeError("no such instruction")

    def wrong(x: Tensor, packed: low_bit.Packed, bias: Tensor | None, _: int) -> Tensor:
        return F.linear(x, plain_weight(packed, x.dtype)) * 1.01

    for kernel, reason in ((broken, "no such instruction"), (wrong, "from float32 where 0.0001 is allowed")):
        low_bit._fault.cache_clear()
        caplog.clear()
        monkeypatch.setattr(low_bit, "multiply_rows", kernel)
        with caplog.at_level(logging.WARNING):
            products = [low_bit_linear(weight, bias, "int4") for _ in range(2)]
        assert len(caplog.records) == 1 and reason in caplog.text and "int4" in caplog.text
        expected = F.linear(rows, plain_weight(pack(weight, "int4"), torch.float32), bias)
        for product in products:
            torch.testing.assert_close(product(rows), expected)
    low_bit._fault.cache_clear()


def test_cuda_needs_no_package_for_its_schemes() -> None:
    for scheme in SCHEMES:
        check_scheme(scheme, torch.device("cuda"), torch.bfloat16)
