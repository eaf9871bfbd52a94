"""Attention over pages, by any kernel, is ordinary causal attention."""

from collections.abc import Callable

import pytest
import torch
from running import ROUNDING, attended, new_cache, random_tokens
from torch import Tensor
from transformers import PreTrainedModel

from rapid.kernels.cpu import attention
from rapid.kernels.cpu.attention import MANY, RunAttention
from rapid.kernels.cpu.jit import available
from rapid.kernels.cuda.attention import PagedAttention, gathered_sdpa
from rapid.kernels.interface import AttentionBackend, BatchEntry
from rapid.kv_cache.pool import KVCache, KVLayout, KVPool
from rapid.models.model import Model

MakeModel = Callable[..., Model]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
KERNELS: dict[str, AttentionBackend] = {"run": RunAttention(), "paged": PagedAttention(gathered_sdpa, page_size=16)}
TOLERANCES = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2}}

each_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
# bfloat16 heads whose size is a multiple of 32 have a compiled kernel where LLVM is installed.
each_case = pytest.mark.parametrize(
    ("kernel", "d", "dtype"),
    [
        pytest.param(KERNELS["run"], 16, torch.float32, id="run-float32"),
        pytest.param(KERNELS["run"], 16, torch.bfloat16, id="run-bfloat16"),
        pytest.param(KERNELS["run"], 64, torch.bfloat16, id="compiled-64"),
        pytest.param(KERNELS["run"], 96, torch.bfloat16, id="compiled-96"),
        pytest.param(KERNELS["paged"], 16, torch.float32, id="paged-float32"),
        pytest.param(KERNELS["paged"], 16, torch.bfloat16, id="paged-bfloat16"),
    ],
)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def plain_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """In float64, a query at a time: the last sees all keys, the one before all but the last. [n, heads · d]."""
    n, heads, _ = query.shape
    num_kv_heads, length, d = keys.shape
    output = torch.empty(n, heads, d, dtype=torch.float64)
    for head in range(heads):
        group = head * num_kv_heads // heads
        for i in range(n):
            visible = slice(0, length - n + i + 1)
            weights = (keys[group, visible].double() @ query[i, head].double() * d**-0.5).softmax(-1)
            output[i, head] = weights @ values[group, visible].double()
    return output.flatten(1)


def filled_cache(pool: KVPool, pages: list[int], rows: Tensor, slots_first: bool) -> KVCache:
    """A cache of ``pages`` that holds keys and values ``rows`` [2, KV heads, length, d]."""
    cache = KVCache(pool, pages, num_shared=0)
    slots = cache.slots(rows.shape[2])
    for store, new in zip((pool.keys, pool.values), rows, strict=True):
        if slots_first:
            store[0][slots] = new.transpose(0, 1)
        else:
            store[0][:, slots] = new
    cache.advance(rows.shape[2])
    return cache


def assert_right(
    kernel: AttentionBackend,
    dtype: torch.dtype,
    heads: tuple[int, int],
    shapes: list[tuple[int, int]],
    *,
    d: int = 16,
    scattered: bool = True,
    garbage: float = 0.0,
    lean: float = 0.0,
) -> None:
    """A batch of sequences with (cached, new) tokens each gets what plain attention gives each alone.

    Keys ``lean`` to one side and queries to the other, so that all scores are far below 0.
    """
    generator = torch.Generator().manual_seed(1)
    num_kv_heads, group = heads
    layout = KVLayout(num_kv_heads, d, dtype, devices=(torch.device("cpu"),))
    num_pages = [-(-(cached + new) // 16) for cached, new in shapes]
    pool = kernel.pool(layout, sum(num_pages) * 16 * layout.bytes_per_token)
    for rows in (*pool.keys, *pool.values):
        rows.fill_(garbage)
    order = torch.randperm(pool.num_pages, generator=generator) if scattered else torch.arange(pool.num_pages)
    pages = [part.tolist() for part in order.split(num_pages)]
    sequences = [torch.randn(2, num_kv_heads, sum(shape), d, generator=generator) for shape in shapes]
    for rows in sequences:
        rows[0] += lean
    sequences = [rows.to(dtype) for rows in sequences]
    entries = []
    for own, rows, (cached, new) in zip(pages, sequences, shapes, strict=True):
        cache = filled_cache(pool, own, rows[:, :, :cached], kernel is KERNELS["paged"])
        entries.append(BatchEntry(cache, [0] * new, 0))
    total = sum(new for _, new in shapes)
    query = (torch.randn(total, num_kv_heads * group, d, generator=generator) - lean).to(dtype)
    keys, values = (
        torch.cat([rows[side, :, cached:] for rows, (cached, _) in zip(sequences, shapes, strict=True)], 1)
        for side in (0, 1)
    )
    output = attended(kernel.batch(entries), query, keys.transpose(0, 1), values.transpose(0, 1), d**-0.5)
    parts = query.split([new for _, new in shapes])
    expected = [plain_attention(part, *rows) for part, rows in zip(parts, sequences, strict=True)]
    torch.testing.assert_close(output.double(), torch.cat(expected), **TOLERANCES[dtype])


@each_case
@pytest.mark.parametrize("num_new", [1, 2, 11, 33, MANY - 1, MANY, 70])
@pytest.mark.parametrize("cached", [0, 1, 16, 75])
@pytest.mark.parametrize("heads", [(1, 1), (1, 9), (2, 2), (3, 3), (4, 1)], ids=lambda heads: "x".join(map(str, heads)))
def test_one_sequence(
    kernel: AttentionBackend, d: int, dtype: torch.dtype, num_new: int, cached: int, heads: tuple[int, int]
) -> None:
    """Few and many query tokens, empty and filled caches, any number of query heads per KV head."""
    assert_right(kernel, dtype, heads, [(cached, num_new)], d=d)


@pytest.mark.parametrize("d", [64, 96])
def test_scores_may_be_far_below_zero(d: int) -> None:
    """In the compiled kernel, whose scores are in float32: others round them to bfloat16."""
    if not available():
        pytest.skip("there are no compiled kernels here")
    assert_right(KERNELS["run"], torch.bfloat16, (2, 2), [(40, 4), (600, 1), (0, 30)], d=d, lean=8.0)


@each_case
@pytest.mark.parametrize("scattered", [False, True])
def test_a_ragged_batch_over_scattered_pages(
    kernel: AttentionBackend, d: int, dtype: torch.dtype, scattered: bool
) -> None:
    """Of several sequences, some begin and some go on, in few tokens and in many."""
    assert_right(
        kernel, dtype, (2, 3), [(0, 9), (7, 1), (40, 4), (0, 80), (100, 70), (31, 33)], d=d, scattered=scattered
    )


@each_case
@pytest.mark.parametrize("num_new", [1, 11, 40])
def test_a_long_cache(kernel: AttentionBackend, d: int, dtype: torch.dtype, num_new: int) -> None:
    assert_right(kernel, dtype, (2, 3), [(3000, num_new)], d=d)


@each_dtype
@pytest.mark.parametrize("num_new", [2, 33, 70])
def test_scores_in_blocks_are_the_same(dtype: torch.dtype, num_new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit into one block of scores is computed in several, down to a row each."""
    for score_bytes in (1, 20_000):
        monkeypatch.setattr(attention, "_SCORE_BYTES", score_bytes)
        assert_right(KERNELS["run"], dtype, (2, 3), [(50, num_new), (0, num_new)])


@each_case
def test_memory_that_was_never_written_does_not_matter(kernel: AttentionBackend, d: int, dtype: torch.dtype) -> None:
    """A pool begins with whatever was there before, and nothing times NaN is NaN."""
    assert_right(kernel, dtype, (2, 2), [(5, 3), (40, 3), (0, 3), (270, 2)], d=d, garbage=torch.nan)


# The same in a whole forward pass


def extended(model: Model, shapes: list[tuple[int, int]]) -> list[BatchEntry]:
    """Sequences with (cached, new) tokens, in one pool that others have left in pieces."""
    pool = model.new_pool(2**18)
    others = [pool.open([], 1) for _ in range(pool.num_pages)]
    for other in others[::2]:
        assert other is not None
        pool.close(other)
    entries = []
    for i, (cached, new) in enumerate(shapes):
        tokens = random_tokens(cached + new, seed=i)
        cache = pool.open([], cached + new)
        assert cache is not None
        assert len(cache.runs(cached + new)) == pool.pages_for(cached + new)
        if cached:
            model.forward([BatchEntry(cache, tokens[:cached], 0)])
        entries.append(BatchEntry(cache, tokens[cached:], min(new, 3)))
    return entries


@each_kernel
def test_a_ragged_pass_over_a_fragmented_pool_equals_each_sequence_alone(
    tiny_model: MakeModel, kernel: AttentionBackend
) -> None:
    """Sequences of any lengths do not see each other, wherever their pages lie."""
    model, reference = tiny_model(attention=kernel), tiny_model()
    shapes = [(0, 9), (7, 1), (40, 4), (0, 80), (100, 70)]
    rows = model.forward(extended(model, shapes))
    for i, (logits, (cached, new)) in enumerate(zip(rows, shapes, strict=True)):
        alone = BatchEntry(new_cache(reference, cached + new), random_tokens(cached + new, seed=i), min(new, 3))
        torch.testing.assert_close(logits, reference.forward([alone])[0], **ROUNDING)


@each_kernel
@pytest.mark.parametrize("chunks", [[120], [1, 119], [64, 40, 16], [50, 1, 1, 68]])
def test_forward_equals_transformers_own(
    tiny_network: Callable[..., PreTrainedModel], tiny_model: MakeModel, kernel: AttentionBackend, chunks: list[int]
) -> None:
    """The logits of a prefill in chunks and of decoding one by one are those of transformers' sdpa attention."""
    model = tiny_model(attention=kernel)
    tokens = random_tokens(sum(chunks) + 8, seed=1)
    with torch.inference_mode():
        expected = tiny_network()(torch.tensor([tokens])).logits[0]
    cache, rows, done = new_cache(model, len(tokens)), [], 0
    for n in [*chunks, *[1] * 8]:
        rows.append(model.forward([BatchEntry(cache, tokens[done : done + n], n)])[0])
        done += n
    torch.testing.assert_close(torch.cat(rows), expected, **CLOSE)


def test_only_the_wanted_rows_come_back(tiny_model: MakeModel) -> None:
    model = tiny_model()
    tokens = random_tokens(20, seed=2)
    whole = model.forward([BatchEntry(new_cache(model, 20), tokens, 20)])[0]
    pool = model.new_pool(2**15)
    entries = []
    for num_rows in (0, 1, 3):
        cache = pool.open([], 20)
        assert cache is not None
        entries.append(BatchEntry(cache, tokens, num_rows))
    none, last, three = model.forward(entries)
    assert none.shape == (0, 32)
    torch.testing.assert_close(last, whole[-1:], **CLOSE)
    torch.testing.assert_close(three, whole[-3:], **CLOSE)
