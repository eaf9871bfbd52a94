"""The fused Triton kernels give what float64 gives, in Triton's interpreter; a wrong or failing one is never chosen."""

import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from running import ROUNDING, logits_after, new_cache, random_tokens
from torch import Tensor

from rapid.kernels.cuda import fused
from rapid.kernels.cuda.attention import FP8, PagedAttention, gathered_sdpa, rotate_and_write
from rapid.kernels.cuda.fused import (
    FUSED,
    add_norm,
    choose_rows,
    choose_writer,
    gate,
    rows_fault,
    triton_rotate_and_write,
    writer_fault,
)
from rapid.kernels.interface import BatchEntry
from rapid.kernels.rows import UNFUSED, RowOperations
from rapid.kv_cache.pool import KVLayout
from rapid.models import llama
from rapid.models.model import Model

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="runs in Triton's interpreter: make test-triton",
)
CPU = torch.device("cpu")
CUDA = torch.device("cuda")  # only its name
# Of the largest number: a rounding of the output, and the first of a sum.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
LAYOUT = KVLayout(2, 16, torch.float32, devices=(CPU,))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    assert ((ours.double() - exact).abs().max() <= tolerance * exact.abs().max()).item()


@interpreted
@each_dtype
@pytest.mark.parametrize("size", [1, 40, 64, 1000, 4096])
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_sum_and_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    x, more, weight = (random(n, size, dtype=dtype, seed=n) for n in (rows, rows, 1))
    before = x.clone()
    total, normed = add_norm(x, more, weight[0], 1e-5)
    assert total.shape == normed.shape == (rows, size) and torch.equal(x, before)
    if rows:
        assert torch.equal(total, x + more)
        exact = total.double() / (total.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
        assert_near(normed, exact * weight.double(), TOLERANCES[dtype])


@interpreted
@each_dtype
@pytest.mark.parametrize("size", [1, 48, 1024, 1500])
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_gate(rows: int, size: int, dtype: torch.dtype) -> None:
    """Also where the exponential of a large gate would be infinite."""
    x = random(rows, 2 * size, dtype=dtype) * 40
    first, second = x.double().chunk(2, -1)
    output = gate(x)
    assert output.shape == (rows, size)
    if rows:
        assert_near(output, first * first.sigmoid() * second, TOLERANCES[dtype])


@interpreted
@each_dtype
@pytest.mark.parametrize("d", [16, 40, 64, 96, 128])
@pytest.mark.parametrize("heads", [(1, 1), (9, 1), (4, 2), (32, 8)], ids=lambda heads: "x".join(map(str, heads)))
def test_rotation_and_writing(heads: tuple[int, int], d: int, dtype: torch.dtype) -> None:
    """Queries and keys turn, as complex numbers made of their halves would; nothing else is written to."""
    num_heads, kv_heads = heads
    given = random(5, num_heads + 2 * kv_heads, d, dtype=dtype)
    angles = torch.rand(5, d // 2, generator=torch.Generator().manual_seed(1)).repeat(1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    slots = torch.tensor([7, 0, 19, 3, 8])
    keys, values = (torch.full((20, kv_heads, d), torch.nan, dtype=dtype) for _ in range(2))
    query = triton_rotate_and_write(given.clone(), (cos, sin), slots, keys, values)
    unit = torch.complex(cos.double(), sin.double())[:, None, : d // 2]
    turned = torch.complex(*given.double().chunk(2, -1)) * unit
    exact = torch.cat((turned.real, turned.imag), -1)
    assert_near(query, exact[:, :num_heads], TOLERANCES[dtype])
    assert_near(keys[slots], exact[:, num_heads : num_heads + kv_heads], TOLERANCES[dtype])
    assert torch.equal(values[slots], given[:, num_heads + kv_heads :])
    untouched = torch.ones(20, dtype=torch.bool).index_fill(0, slots, False)
    assert keys[untouched].isnan().all() and values[untouched].isnan().all()


@interpreted
def test_keys_and_values_of_8_bits_are_the_nearest() -> None:
    heads, angles = random(5, 8, 16), random(5, 16)
    rotation, slots = (angles.cos(), angles.sin()), torch.tensor([3, 1, 0, 4, 2])
    ours, exact = ([torch.zeros(5, 2, 16, dtype=dtype) for _ in range(2)] for dtype in (FP8, torch.float32))
    triton_rotate_and_write(heads.clone(), rotation, slots, *ours)
    rotate_and_write(heads.clone(), rotation, slots, *exact)
    for stored, numbers in zip(ours, exact, strict=True):
        nearest = numbers.to(FP8)
        # Triton's interpreter loses the carry of what is rounded up to a power of two.
        compared = nearest.view(torch.uint8) & 7 != 0
        assert compared.sum() > 0.8 * compared.numel()
        assert torch.equal(stored.float()[compared], nearest.float()[compared])


@interpreted
def test_a_row_may_lie_apart_from_the_next() -> None:
    heads = random(5, 16, 16)[:, 2:10]
    before, angles = heads.clone(), random(5, 16)
    outputs = []
    for write, given in ((triton_rotate_and_write, heads), (rotate_and_write, before)):
        keys, values = torch.zeros(5, 2, 16), torch.zeros(5, 2, 16)
        outputs.append((write(given, (angles.cos(), angles.sin()), torch.arange(5), keys, values), keys, values))
    for ours, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@interpreted
@each_dtype
def test_the_probes_at_load_find_no_fault(dtype: torch.dtype) -> None:
    assert rows_fault(FUSED, CPU, dtype, 1000, 1500) is None
    assert writer_fault(triton_rotate_and_write, KVLayout(2, 40, dtype, (CPU,)), 6) is None


@interpreted
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_model_with_fused_operations_is_the_same_model(
    tiny_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Prefill, steps and a rollback."""
    reference = tiny_model(kind=kind)
    monkeypatch.setattr(llama, "choose_rows", lambda *_: FUSED)
    backend = PagedAttention(gathered_sdpa, page_size=16, writer=triton_rotate_and_write)
    model, tokens = tiny_model(kind=kind, attention=backend), random_tokens(40, seed=1)
    cache = new_cache(model, 60)
    model.forward([BatchEntry(cache, tokens[:30], 0)])
    cache.truncate(25)
    for i in range(25, 40):
        logits = model.forward([BatchEntry(cache, tokens[i : i + 1], 1)])[0][0]
    torch.testing.assert_close(logits, logits_after(reference, tokens), **ROUNDING)


# How they are chosen needs no Triton


def unscaled(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total, normed = UNFUSED.add_norm(x, more, weight, eps)
    return total, normed / weight


def failing(*_: Any) -> Any:
    raise RuntimeError("no kernel image\nand more")


def to_the_next_slot(heads: Tensor, rotation: Any, slots: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return rotate_and_write(heads, rotation, slots + 1, keys, values)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (UNFUSED._replace(add_norm=unscaled), "from float32"),
        (UNFUSED._replace(gate=lambda x: x.chunk(2, -1)[0] * torch.nan), "nan from float32"),
        (UNFUSED._replace(gate=failing), "RuntimeError: no kernel image"),
    ],
)
def test_rows_that_are_wrong_or_fail_have_a_fault(rows: RowOperations, reason: str) -> None:
    assert rows_fault(UNFUSED, CPU, torch.bfloat16, 48, 100) is None
    assert reason in (rows_fault(rows, CPU, torch.bfloat16, 48, 100) or "")


@pytest.mark.parametrize(("writer", "reason"), [(to_the_next_slot, "from float32"), (failing, "no kernel image")])
def test_a_writer_that_is_wrong_or_fails_has_a_fault(writer: Any, reason: str) -> None:
    for layout in (LAYOUT, KVLayout(2, 16, torch.bfloat16, (CPU,), FP8)):
        assert writer_fault(rotate_and_write, layout, 4) is None
        assert reason in (writer_fault(writer, layout, 4) or "")


def test_what_has_a_fault_is_named_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layout = KVLayout(2, 16, torch.float32, devices=(CUDA,))
    for name in ("rows_fault", "writer_fault"):
        monkeypatch.setattr(fused, name, lambda *_: None)
    assert choose_rows(CUDA, torch.float32, 48, 100) is FUSED
    assert choose_writer(layout, 4) is triton_rotate_and_write
    assert not caplog.records
    for name in ("rows_fault", "writer_fault"):
        monkeypatch.setattr(fused, name, lambda *_: "it is far away")
    with caplog.at_level(logging.WARNING):
        assert choose_rows(CUDA, torch.float32, 48, 100) is UNFUSED
        assert choose_writer(layout, 4) is rotate_and_write
    assert caplog.text.count("it is far away") == 2


def test_other_devices_have_no_fused_kernels() -> None:
    assert choose_rows(CPU, torch.float32, 48, 100) is UNFUSED
    assert choose_writer(LAYOUT, 4) is rotate_and_write
