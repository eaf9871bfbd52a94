"""Keys and values stored with 8 bits: attention is off by their rounding and no more."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from running import attended
from test_attention import plain_attention
from torch import Tensor

from rapid.errors import ModelFileError
from rapid.kernels.cpu import jit
from rapid.kernels.cpu.attention import RunAttention
from rapid.kernels.cuda.attention import FP8, PagedBatch, gathered_sdpa
from rapid.kernels.cuda.choice import DECODE, FEW, MANY, fault
from rapid.kernels.cuda.prefill import varlen_paged
from rapid.kernels.interface import BatchEntry
from rapid.kernels.kv_dtype import check_kv_dtype
from rapid.kv_cache.pool import KVCache, KVLayout

CPU = (torch.device("cpu"),)
compiled = pytest.mark.skipif(not jit.available(), reason="there are no compiled kernels here")


def rounded(rows: Tensor) -> Tensor:
    """In 255 steps of the largest magnitude of each row, as int8 pages are said to hold it."""
    scale = rows.double().abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (rows.double() / scale).round() * scale


def int8_distances(heads: tuple[int, int], shapes: list[tuple[int, int]], d: int) -> tuple[float, float]:
    """Of a batch of sequences with (cached, new) tokens from float64, relative: over rounded and given numbers."""
    generator = torch.Generator().manual_seed(1)
    num_kv_heads, group = heads
    layout = KVLayout(num_kv_heads, d, torch.bfloat16, CPU, kv_dtype=torch.int8)
    backend, num_pages = RunAttention(), [-(-(cached + new) // 16) for cached, new in shapes]
    pool = backend.pool(layout, sum(num_pages) * 16 * layout.bytes_per_token)
    for rows in (*pool.keys, *pool.values):
        rows.fill_(-1)  # scales are then NaN
    order = torch.randperm(pool.num_pages, generator=generator).split(num_pages)
    sequences = [torch.randn(2, num_kv_heads, sum(shape), d, generator=generator).bfloat16() for shape in shapes]
    query = torch.randn(sum(map(sum, shapes)), num_kv_heads * group, d, generator=generator).bfloat16()

    def attend(entries: list[BatchEntry], new: list[Tensor]) -> Tensor:
        keys, values = torch.cat(new, 2).transpose(1, 2)
        return attended(backend.batch(entries), query[: len(keys)], keys, values, d**-0.5)

    entries = []
    for own, rows, (cached, new) in zip(order, sequences, shapes, strict=True):
        cache = KVCache(pool, own.tolist(), num_shared=0)
        if cached:
            attend([BatchEntry(cache, [0] * cached, 0)], [rows[:, :, :cached]])
            cache.advance(cached)
        entries.append(BatchEntry(cache, [0] * new, 0))
    output = attend(entries, [rows[:, :, cached:] for rows, (cached, _) in zip(sequences, shapes, strict=True)])
    parts = query[: len(output)].split([new for _, new in shapes])

    def distance(seen: Callable[[Tensor], Tensor]) -> float:
        each = (plain_attention(seen(part), *seen(rows)) for part, rows in zip(parts, sequences, strict=True))
        expected = torch.cat(list(each))
        return ((output.double() - expected).norm() / expected.norm()).item()

    return distance(rounded), distance(lambda numbers: numbers)


@compiled
@pytest.mark.parametrize("d", [64, 96])
@pytest.mark.parametrize("heads", [(1, 1), (2, 3), (1, 9)], ids=lambda heads: "x".join(map(str, heads)))
def test_int8_pages_hold_numbers_in_255_steps(heads: tuple[int, int], d: int) -> None:
    """Scattered and ragged, over memory that holds NaN; nothing else but the output is rounded by much."""
    shapes = [(0, 9), (7, 1), (40, 4), (0, 80), (100, 70), (31, 33), (600, 5)]
    to_rounded, to_given = int8_distances(heads, shapes, d)
    assert to_rounded < 3e-3 < 5e-3 < to_given < 2e-2


@compiled
def test_small_weights_beside_a_large_one_are_not_lost() -> None:
    """Of 255 positions each has a 300th of the weight of the first, so together they outweigh most of it."""
    layout = KVLayout(1, 64, torch.bfloat16, CPU, kv_dtype=torch.int8)
    backend = RunAttention()
    pool = backend.pool(layout, 16 * 17 * layout.bytes_per_token)
    cache = pool.open([], 256)
    assert cache is not None
    keys, values = torch.zeros(256, 1, 64), torch.zeros(256, 1, 64)
    keys[0, 0, 0] = 5.7  # e⁵·⁷ is about 300
    values[0], values[1:] = 1.0, -1.0
    query = torch.zeros(256, 1, 64)
    query[:, 0, 0] = 1.0
    new = [numbers.bfloat16() for numbers in (query, keys, values)]
    last = attended(backend.batch([BatchEntry(cache, [0] * 256, 0)]), *new, 1.0)[-1]
    expected = plain_attention(new[0][-1:] * 8, new[1].transpose(0, 1), new[2].transpose(0, 1))[0]
    torch.testing.assert_close(last.double(), expected, rtol=0, atol=4e-3)


def test_sizes() -> None:
    """Of a token in a layer with 3 KV heads of 64: bfloat16, 8-bit floats, and 8-bit integers with scales."""
    sizes = [
        KVLayout(3, 64, torch.bfloat16, CPU, kv_dtype=kv_dtype).bytes_per_token for kv_dtype in (None, FP8, torch.int8)
    ]
    assert sizes == [2 * 3 * 64 * 2, 2 * 3 * 64, 2 * 3 * (64 + 4)]


CUDA = (torch.device("cuda"),)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (KVLayout(1, 64, torch.bfloat16, CPU, kv_dtype=FP8), "'fp8' is for CUDA"),
        (KVLayout(1, 64, torch.float32, CUDA, kv_dtype=FP8), "bfloat16 or float16"),
        (KVLayout(1, 64, torch.bfloat16, CUDA, kv_dtype=torch.int8), "'int8' is for a CPU"),
        (KVLayout(1, 64, torch.float32, CPU, kv_dtype=torch.int8), "goes with dtype bfloat16"),
        (KVLayout(1, 16, torch.bfloat16, CPU, kv_dtype=torch.int8), "heads of 16"),
    ],
)
def test_what_no_kernel_reads_is_refused_by_name(layout: KVLayout, reason: str) -> None:
    with pytest.raises(ModelFileError, match=reason):
        check_kv_dtype(layout)


# fp8, with CUDA's backend on CPU tensors

FP8_LAYOUT = KVLayout(2, 16, torch.bfloat16, CPU, kv_dtype=FP8)


@pytest.mark.parametrize("case", [FEW, DECODE, MANY])
def test_the_probe_takes_the_case_of_8_bit_floats(case: Any) -> None:
    assert fault(gathered_sdpa, FP8_LAYOUT, 6, case) is None

    def twice(query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scaling: float) -> Tensor:
        return gathered_sdpa(query, keys, values, batch, scaling) * 2

    assert "from SDPA" in (fault(twice, FP8_LAYOUT, 6, case) or "")
    assert "8-bit floats" in (fault(varlen_paged, FP8_LAYOUT, 6, case) or "")
