"""Where a CPU multiplies tiles, the kernels of CPUs that do not are tested too; elsewhere all other tests do so."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_attention
import test_linear
import torch

from rapid.kernels.cpu import attention_plan, jit, linear

pytestmark = pytest.mark.skipif(
    not jit.available() or not jit.multiplies_tiles(), reason="this machine multiplies no tiles"
)


@pytest.fixture(autouse=True, scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the kernels without tiles."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "cache_dir", lambda: folder)
        for module, name in ((attention_plan, "attention_kernel"), (linear, "_kernel")):
            patch.setattr(module, "multiplies_tiles", lambda: False)
            patch.setattr(module, name, functools.cache(getattr(module, name).__wrapped__))
        yield folder


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8, 50])
@pytest.mark.parametrize("shape", [(64, 576), (40, 80), (33, 17)], ids=str)
def test_products(num_rows: int, shape: tuple[int, int]) -> None:
    test_linear.test_dense_weights_are_exact(torch.bfloat16, shape, True, num_rows)
    test_linear.test_quantised_weights_are_off_by_half_a_step_at_most("int4", True, num_rows)


@pytest.mark.parametrize("d", [64, 96])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (1, 9)], ids=str)
def test_attention_over_pages(d: int, heads: tuple[int, int]) -> None:
    kernel = test_attention.KERNELS["run"]
    shapes = [(0, 9), (7, 1), (40, 4), (600, 30), (31, 33)]
    test_attention.assert_right(kernel, torch.bfloat16, heads, shapes, d=d)
    test_attention.assert_right(kernel, torch.bfloat16, heads, shapes, d=d, garbage=torch.nan)


def test_a_kernel_with_tiles_is_another_one(kept: Path) -> None:
    """One folder may serve processes that are given tiles and processes that are not."""
    linear._kernel(16)
    attention_plan.attention_kernel(torch.bfloat16, (2, 3), 64, 64**-0.5)
    assert not list(kept.rglob("*tiles*")) and len(list(kept.rglob("*.o"))) >= 2


def test_halves_of_words_are_moved_by_the_register(kept: Path) -> None:
    """LLVM moves each by itself where it may use instructions for float16, in ten times the code (and the time)."""
    linear._kernel(16)
    linear._kernel(8)
    sizes = {bits: next(kept.rglob(f"product-{bits}-*.o")).stat().st_size for bits in (16, 8)}
    assert sizes[8] < 2 * sizes[16]
