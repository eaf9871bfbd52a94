"""The Triton kernels for few rows, in Triton's interpreter, give what attention in float64 gives."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pretended import pretend_cuda
from running import ROUNDING, attended, logits_after, new_cache, random_tokens

from benchmarks.common import paged_cases
from benchmarks.common.paged_cases import Case, error, plain
from rapid.kernels.cuda.attention import PagedAttention, PagedBatch, gathered_sdpa, rotate_and_write
from rapid.kernels.cuda.choice import DECODE, FEW, SHARING, ByRows, fault, triton_split
from rapid.kernels.cuda.paged_split import cut
from rapid.kernels.interface import BatchEntry
from rapid.kv_cache.pool import KVLayout
from rapid.kv_cache.table import PageTable
from rapid.models.info import GraphLimits
from rapid.models.model import Model
from rapid.models.pass_inputs import Shape

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="runs in Triton's interpreter: make test-triton",
)
EXACT = 3e-6  # float32
ROUNDED = {torch.float16: 3e-3}  # Triton's interpreter multiplies bfloat16's bits as integers (triton issue 11584)

RAGGED = ((0, 3), (75, 1), (40, 17), (7, 2), (33, 16), (100, 5), (1, 1), (300, 9))


@interpreted
@pytest.mark.parametrize("num_new", range(1, 18))
def test_one_to_seventeen_new_tokens_and_one_to_nine_heads_a_group(num_new: int) -> None:
    for group in range(1, 10):
        case = Case([(35, num_new), (0, num_new)], kv_heads=1, group=group, num_sms=2, seed=group)
        assert error(case) < EXACT


@interpreted
@pytest.mark.parametrize("batch", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("num_sms", [1, 6, 200])
def test_ragged_batches(batch: int, num_sms: int) -> None:
    """Split into one part, into some, and into as many as there are blocks."""
    assert error(Case(RAGGED[-batch:], group=3, num_sms=num_sms)) < EXACT


@interpreted
@pytest.mark.parametrize("d", [8, 16, 40, 64, 96, 128])
def test_head_sizes(d: int) -> None:
    assert error(Case(RAGGED[1:3], d=d, page_size=64)) < EXACT


@interpreted
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_16_bit_numbers_over_pages_as_the_engine_has_them(dtype: torch.dtype) -> None:
    assert error(Case([(700, 5), (255, 1), (0, 17)], d=64, page_size=256, dtype=dtype)) < ROUNDED[dtype]


@interpreted
@pytest.mark.parametrize("num_sms", [1, 40])
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (4, 20), (0, 16), (16, 17), (70, 33), (5, 1000)])
def test_sinks_and_a_window(sinks: int, window: int, num_sms: int) -> None:
    """Both end within blocks, at their borders, overlap each other, or hold everything."""
    assert error(Case(RAGGED, group=2, sinks=sinks, window=window, num_sms=num_sms)) < EXACT


CHOSEN = ([0], [3, 0, 4], [1, 3, 2], [0], [2, 3], [], [0], [19, 3, 7, 0])


@interpreted
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("num_sms", [1, 40])
def test_chosen_pages(num_sms: int, window: int | None) -> None:
    """In any order, with or without the new tokens' own; a token that sees nothing gets zeros."""
    assert error(Case(RAGGED, group=2, chosen=CHOSEN, sinks=3, window=window, num_sms=num_sms)) < EXACT


# (first, end, shared pages of 16 tokens) of neighbours in GROUPED, whose caches are long enough.
GROUPED = ((75, 1), (80, 4), (64, 17), (200, 2), (300, 16), (100, 5), (33, 1), (47, 9))
GROUPS = {
    "a pair": [(0, 2, 4), *((i, i + 1, 0) for i in range(2, 8))],
    "three of them": [(0, 3, 4), (3, 5, 12), (5, 8, 2)],
    "alone between": [(0, 1, 0), (1, 3, 4), (3, 4, 0), (4, 6, 6), (6, 7, 0), (7, 8, 0)],
    "all eight": [(0, 8, 2)],
}


@interpreted
@pytest.mark.parametrize("num_sms", [1, 6, 40])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_pages_that_neighbours_share_are_read_once_and_change_nothing(
    groups: list[tuple[int, int, int]], num_sms: int
) -> None:
    """Up to all of a sequence's cached pages, beside sequences without a group."""
    assert error(Case(GROUPED, group=3, groups=groups, num_sms=num_sms)) < EXACT


@interpreted
@pytest.mark.parametrize("size", range(2, 9))
def test_groups_of_two_to_eight(size: int) -> None:
    """One token each, and nothing but the shared pages before it."""
    assert error(Case([(64, 1)] * size, groups=[(0, size, 4)], num_sms=12)) < EXACT


@interpreted
def test_shared_float8_and_16_bit_pages() -> None:
    assert error(Case(GROUPED, d=32, groups=GROUPS["three of them"], fp8=True)) < EXACT
    case = Case([(700, 5), (600, 1), (512, 17)], d=64, page_size=256, dtype=torch.float16, groups=[(0, 3, 2)])
    assert error(case) < ROUNDED[torch.float16]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_float8_keys_and_values_with_a_scale_for_each_head(dtype: torch.dtype) -> None:
    assert error(Case(RAGGED[:4], d=32, dtype=dtype, fp8=True)) < ROUNDED.get(dtype, EXACT)


@interpreted
def test_the_distance_shows_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would prove nothing."""
    case = Case([(20, 3), (5, 2)])
    monkeypatch.setattr(paged_cases, "plain", lambda *args: plain(*args[:3], replace(case, window=20), args[4]))
    assert error(case) > 100 * EXACT


@interpreted
@pytest.mark.parametrize("width", [1, 8], ids=["one part", "several parts"])
def test_rows_of_a_query_may_lie_apart_and_rows_of_no_sequence_get_zeros(width: int) -> None:
    """As after the projection that gives queries, keys and values in one; and as in a graph's unused places."""
    backend = PagedAttention(triton_split, page_size=16)
    layout = KVLayout(2, 16, torch.float32, devices=(torch.device("cpu"),))
    pool = backend.pool(layout, 2**16)
    for rows in (*pool.keys, *pool.values):
        rows.fill_(torch.nan)
    table = torch.full((4, width), pool.num_pages, dtype=torch.int32)
    table[0, 0] = 2
    batch = PagedBatch(
        pool=pool,
        slots=torch.cat((torch.arange(32, 35), torch.full((9,), pool.spare_slot))),
        table=table,
        lengths=torch.tensor([3, 0, 0, 0], dtype=torch.int32),
        starts=torch.tensor([0, 3, 3, 3, 3], dtype=torch.int32),
        max_new=3,
        kernel=triton_split,
        writer=rotate_and_write,
    )
    fused = torch.randn(12, 8, 16, generator=torch.Generator().manual_seed(0))
    unturned = torch.ones(12, 16), torch.zeros(12, 16)
    output = batch.attend(0, fused, unturned, 0.25)
    expected = replace(batch, kernel=gathered_sdpa).attend(0, fused, unturned, 0.25)
    assert not output[3:].any() and not expected[3:].any()
    torch.testing.assert_close(output[:3], expected[:3], rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("case", [FEW, DECODE, SHARING], ids=["few", "decode", "sharing"])
def test_the_probe_at_load_finds_no_fault(case: tuple[tuple[int, int], ...], kv_dtype: torch.dtype | None) -> None:
    layout = KVLayout(2, 16, torch.float32, devices=(torch.device("cpu"),), kv_dtype=kv_dtype)
    assert fault(triton_split, layout, 6, case) is None


@interpreted
def test_forward_passes_are_those_of_the_other_backend(tiny_model: Callable[..., Model]) -> None:
    """Prefill and decode in one pass, through the replayed buffers and without them, with a rollback between."""
    kernel = PagedAttention(ByRows(triton_split, gathered_sdpa), page_size=16)
    model, reference = tiny_model(attention=kernel), tiny_model()
    assert model.info.attention == "triton_split, prefill gathered_sdpa"
    pool = model.new_pool(2**18)
    caches = [cache for cache in (pool.open([], 200), pool.open([], 200)) if cache is not None]
    others = [new_cache(reference, 200) for _ in range(2)]
    for lengths in ((40, 1), (5, 17), (1, 30), (3, 3), (1, 1)):
        tokens = [random_tokens(n, seed=i + n) for i, n in enumerate(lengths)]
        rows = model.forward([BatchEntry(c, t, 1) for c, t in zip(caches, tokens, strict=True)])
        for i, (other, t) in enumerate(zip(others, tokens, strict=True)):
            torch.testing.assert_close(rows[i], reference.forward([BatchEntry(other, t, 1)])[0], **ROUNDING)
        for cache in (*caches, *others):
            cache.truncate(cache.length - 1)


@interpreted
def test_replayed_passes_share_pages(tiny_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the buffers, in shapes of more sequences than there are."""
    recorder = pretend_cuda(monkeypatch)
    shapes = [Shape(16, 4, 8), Shape(4, 4, 1)]
    monkeypatch.setattr(Shape, "all", lambda: shapes + [shape._replace(shares=True) for shape in shapes])
    monkeypatch.setattr("rapid.kernels.cuda.attention.WORTH_SHARING_BYTES", 0)
    model, reference = tiny_model(attention=PagedAttention(triton_split, page_size=16)), tiny_model()
    pool, text = model.new_pool(2**18), random_tokens(50, seed=1)
    runner = model.record(pool, GraphLimits(seconds=600))
    assert runner is not None and len(runner.shapes) == 4
    first = pool.open(text, 90)
    assert first is not None
    model.compute([BatchEntry(first, text, 0)])
    first.advance(len(text))
    pool.insert(first, text, len(text))
    caches = [first, *(cache for cache in (pool.open(text, 90) for _ in range(2)) if cache is not None)]
    texts = [text, *(text[: cache.length] for cache in caches[1:])]
    assert [cache.length for cache in caches] == [50, 48, 48]
    for lengths in ((1, 2, 5), (1, 1, 1), (3, 1, 2)):
        new = [random_tokens(n, seed=n + i) for i, n in enumerate(lengths)]
        rows = model.forward([BatchEntry(c, t, 1) for c, t in zip(caches, new, strict=True)])
        texts = [text + tokens for text, tokens in zip(texts, new, strict=True)]
        for logits, text in zip(rows, texts, strict=True):
            torch.testing.assert_close(logits[0], logits_after(reference, text), **ROUNDING)
    assert recorder.num_replays == 3


@interpreted
def test_a_batch_of_sequences_with_shared_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """From caches to the kernel; where the saved reads are not worth a launch, nothing is shared."""
    backend = PagedAttention(triton_split, page_size=16)
    layout = KVLayout(2, 16, torch.float32, devices=(torch.device("cpu"),))
    pool = backend.pool(layout, 2**18)
    generator = torch.Generator().manual_seed(0)
    for rows in (*pool.keys, *pool.values):
        rows.normal_(generator=generator)
    pages = [[7, 3, 9, own] for own in (1, 2, 4)] + [[20, 21, 22, 23]]
    entries = [BatchEntry(PageTable(pool, own, 50), [0] * new, 0) for own, new in zip(pages, (1, 5, 2, 3), strict=True)]
    fused = torch.randn(11, 8, 16, generator=generator)
    outputs = []
    for worth in (0, 2**40):
        monkeypatch.setattr("rapid.kernels.cuda.attention.WORTH_SHARING_BYTES", worth)
        batch = backend.batch(entries)
        assert isinstance(batch, PagedBatch)
        assert (batch.prefix is None) == (worth > 0)
        if batch.prefix is not None:
            assert [part.tolist() for part in batch.prefix.tensors()] == [
                [0, 8, 11, 11, 11],
                [3, 0, 0, 0],
                [0, 3, 0, 0],
                [3, 3, 3, 0],
            ]
        outputs.append(attended(batch, *fused.split((4, 2, 2), 1), 0.25))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


# How a launch is cut needs no Triton


def test_parts_fill_the_device_and_no_more() -> None:
    def parts(num_sequences: int, max_new: int, width: int) -> int:
        made = cut(
            num_sequences,
            (32, 8),
            128,
            torch.bfloat16,
            max_new=max_new,
            width=width,
            page_size=256,
            num_sms=132,
        )
        assert made.rows * made.row_blocks >= 4 * max_new
        return made.parts

    assert parts(1, 1, 480) == 66  # 8 programs a part, four on each processor
    assert parts(1, 5, 480) == 49
    assert parts(8, 17, 480) == 2
    assert parts(64, 17, 480) == 1
    assert parts(1, 1, 2) == 8  # a part has at least a block of 64 positions


@pytest.mark.parametrize(("d", "dtype"), [(256, torch.float32), (512, torch.bfloat16)], ids=str)
def test_heads_too_large_for_registers_are_refused(d: int, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="too large"):
        cut(1, (8, 8), d, dtype, max_new=1, width=1, page_size=256, num_sms=132)
