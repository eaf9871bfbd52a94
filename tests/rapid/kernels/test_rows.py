"""Norm, gate, rotation and storing are what their formulas say, compiled or not, in either number format."""

import pytest
import torch
from torch import Tensor

from rapid.kernels.cpu import rows as cpu_rows
from rapid.kernels.cpu.rows import gated, rms_norm, rotate, store

TOLERANCES = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 1e-2}}

each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
each_size = pytest.mark.parametrize("size", [64, 96, 20])  # the last has no kernel
each_count = pytest.mark.parametrize("rows", [1, 5, 40])


@pytest.fixture(autouse=True, params=[True, False], ids=["compiled", "plain"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(cpu_rows, "available", lambda: False)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@each_dtype
@each_size
@each_count
def test_rms_norm(dtype: torch.dtype, size: int, rows: int) -> None:
    x, weight = random(rows, size, dtype=dtype), random(size, dtype=dtype, seed=1)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), expected, **TOLERANCES[dtype])


@each_dtype
@each_size
@each_count
def test_gated(dtype: torch.dtype, size: int, rows: int) -> None:
    """Also where the exponential of a large gate would be infinite."""
    x = random(rows, 2 * size, dtype=dtype) * 40
    gate, up = x.double().chunk(2, -1)
    torch.testing.assert_close(gated(x.clone()).double(), gate * gate.sigmoid() * up, **TOLERANCES[dtype])


@each_dtype
@each_size
@each_count
def test_rotate(dtype: torch.dtype, size: int, rows: int) -> None:
    """The first heads turn, as complex numbers made of their halves would; the others do not."""
    heads = random(rows, 5, size, dtype=dtype)
    angles = torch.rand(rows, size // 2).repeat(1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    first, second = heads[:, :3].double().chunk(2, -1)
    unit = torch.complex(cos.double(), sin.double())[:, None, : size // 2]
    turned = torch.complex(first, second) * unit
    expected = torch.cat((torch.cat((turned.real, turned.imag), -1), heads[:, 3:].double()), 1)
    torch.testing.assert_close(rotate(heads.clone(), cos, sin, 3).double(), expected, **TOLERANCES[dtype])


@each_dtype
@each_size
@each_count
def test_store(dtype: torch.dtype, size: int, rows: int) -> None:
    heads = random(rows, 7, size, dtype=dtype)
    cache = torch.zeros(2, 100, size, dtype=dtype)
    slots = torch.randperm(100)[:rows]
    store(heads[:, 3:5], slots, cache)
    assert torch.equal(cache[:, slots], heads[:, 3:5].transpose(0, 1))
    assert cache.count_nonzero() == heads[:, 3:5].count_nonzero()
