"""Static buffers, filled anew for every pass, give what a pass made for the occasion gives.

The device is pretended: what it would record as a graph is kept as a call.
"""

import functools
import gc
import itertools
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pretended import FAILS, PretendedRecorder, pretend_cuda
from running import ROUNDING, VOCAB, logits_after, random_tokens
from torch import Tensor

from rapid.kernels.cuda.attention import PagedAttention, PagedBatch, gathered_sdpa, recordable
from rapid.kernels.interface import BatchEntry
from rapid.kv_cache.pool import KVCache, KVPool
from rapid.models import recorded_cuda
from rapid.models.info import GraphLimits
from rapid.models.model import Model
from rapid.models.pass_inputs import MAX_NEW, MAX_ROWS, MAX_SEQUENCES, Shape
from rapid.models.recorded_cuda import GraphRunner

LIMITS = GraphLimits(seconds=600)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> PretendedRecorder:
    return pretend_cuda(monkeypatch)


@pytest.fixture
def model(tiny_model: Callable[..., Model], recorder: PretendedRecorder) -> Model:
    return tiny_model(attention=recorder.attention)


def recorded(model: Model, pool: KVPool, limits: GraphLimits = LIMITS) -> GraphRunner:
    runner = model.record(pool, limits)
    assert runner is not None
    return runner


def filled(model: Model, pool: KVPool, tokens: list[int]) -> KVCache:
    cache = pool.open([], len(tokens) + 80)
    assert cache is not None
    if tokens:
        model.compute([BatchEntry(cache, tokens, 0)])
        cache.advance(len(tokens))
    return cache


def is_replayed(runner: GraphRunner, entries: list[BatchEntry]) -> bool:
    with torch.inference_mode():
        return runner.run(entries) is not None


@pytest.mark.parametrize(
    "rounds",
    [
        [(1,), (2,), (17,), (1,)],
        [(1, 1, 1), (1, 5, 17), (3, 1), (17, 17, 17), (2, 1, 4), (1,)],
        [(1, 2, 3, 4, 5, 6, 7, 8), (1,) * 8, (17, 1, 1), (9, 9, 1, 1, 1)],
    ],
    ids=["one sequence", "three", "eight"],
)
@pytest.mark.parametrize("on_device", [0, 1, 2], ids=["host", "device", "mixed"])
def test_replayed_passes_equal_eager_ones(
    tiny_model: Callable[..., Model],
    model: Model,
    recorder: PretendedRecorder,
    rounds: list[tuple[int, ...]],
    on_device: int,
) -> None:
    """Ragged passes, round after round in the same buffers, with rollbacks between them."""
    reference, pool = tiny_model(), model.new_pool(2**19)
    recorded(model, pool)
    texts = [random_tokens(length, seed=length) for length in (0, 20, 33, 1, 16, 47, 64, 5)][: max(map(len, rounds))]
    caches = [filled(model, pool, text) for text in texts]
    for round_number, lengths in enumerate(rounds):
        new = [random_tokens(n, seed=n + round_number) for n in lengths]
        entries = [
            BatchEntry(
                cache, torch.tensor(tokens) if (0, 1, i % 3 > 0)[on_device] else tokens, (1, len(tokens), 0)[i % 3]
            )
            for i, (cache, tokens) in enumerate(zip(caches, new, strict=False))
        ]
        before = recorder.num_replays
        rows = model.forward(entries)
        assert recorder.num_replays == before + 1
        for i, tokens in enumerate(new):
            texts[i] = texts[i] + tokens
            assert (caches[i].length, len(rows[i])) == (len(texts[i]), entries[i].num_rows)
            if len(rows[i]):
                torch.testing.assert_close(rows[i][-1], logits_after(reference, texts[i]), **ROUNDING)
            if len(tokens) > 2:  # as a rejected draft is rolled back
                texts[i] = texts[i][:-2]
                caches[i].truncate(len(texts[i]))
    for cache, text in zip(caches, texts, strict=True):  # and nobody's past was written to
        cache.truncate(len(text) - 1)
        logits = model.compute([BatchEntry(cache, text[-1:], 1)])[0]
        torch.testing.assert_close(logits[:VOCAB], logits_after(reference, text), **ROUNDING)


def test_there_are_few_shapes_and_each_pass_of_few_tokens_has_one() -> None:
    shapes = [shape for shape in Shape.all() if not shape.shares]
    assert len(shapes) == len(set(shapes)) == 43
    assert shapes[0] == (MAX_ROWS, MAX_SEQUENCES, MAX_NEW[-1], False) == tuple(map(max, zip(*shapes, strict=True)))
    several = [shape for shape in shapes if shape.sequences > 1]
    assert {shape._replace(shares=False) for shape in Shape.all()[43:]} == set(several) and len(several) == 39
    seen = set()
    for sequences, longest in itertools.product(range(1, MAX_SEQUENCES + 1), range(1, MAX_NEW[-1] + 1)):
        for total in range(sequences - 1 + longest, min(sequences * longest, MAX_ROWS) + 1):
            rest = total - longest
            counts = [longest] + [rest // (sequences - 1) + (i < rest % (sequences - 1)) for i in range(sequences - 1)]
            shape = Shape.of(counts)
            assert shape is not None and shape.rows >= total and shape.max_new >= longest
            assert shape.sequences >= sequences and shape.sequences < 2 * sequences
            seen.add(shape)
    assert seen == set(shapes)  # and none is recorded in vain
    assert Shape.of([MAX_NEW[-1] + 1]) is None  # a prefill chunk
    assert Shape.of([1] * (MAX_SEQUENCES + 1)) is None
    assert Shape.of([MAX_NEW[-1]] * MAX_SEQUENCES) is None


def test_pages_that_are_shared_are_told_to_the_kernel(
    tiny_model: Callable[..., Model], recorder: PretendedRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that sees of the shared pages only what the groups say, in round after round of other groups."""
    told = []

    @recordable
    def by_groups(query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scaling: float) -> Tensor:
        prefix = batch.prefix
        if prefix is None:
            return gathered_sdpa(query, keys, values, batch, scaling)
        told.append(prefix.skipped.tolist())
        table, last = torch.zeros_like(batch.table), len(batch.table) - 1
        groups = torch.bucketize(batch.starts[:-1], prefix.starts[1:], right=True).clamp_max(last)
        for s, (skipped, group) in enumerate(zip(prefix.skipped.tolist(), groups.tolist(), strict=True)):
            assert skipped == (prefix.pages[group] if batch.lengths[s] else 0)
            table[s, :skipped] = batch.table[prefix.table_rows[group], :skipped]
            table[s, skipped:] = batch.table[s, skipped:]
        return gathered_sdpa(query, keys, values, replace(batch, table=table), scaling)

    monkeypatch.setattr("rapid.kernels.cuda.attention.WORTH_SHARING_BYTES", 1)
    model = tiny_model(attention=PagedAttention(by_groups, page_size=16))
    pool, reference = model.new_pool(2**19), tiny_model()
    runner = recorded(model, pool)
    assert runner.shapes == set(Shape.all())
    told.clear()
    one, other = random_tokens(70, seed=1), random_tokens(40, seed=2)
    texts = []
    caches = []
    for text in (one, one, other, random_tokens(20, seed=3), other, one):
        cache = pool.open(text, 100)
        assert cache is not None
        if cache.length < len(text) - 16:
            model.compute([BatchEntry(cache, text[cache.length :], 0)])
            cache.advance(len(text) - cache.length)
            pool.insert(cache, text, len(text))
        caches.append(cache)
        texts.append(text[: cache.length])
    for order, skipped in (([0, 1, 5, 2, 4, 3], [4, 4, 4, 2, 2, 0]), ([3, 2, 4], [0, 2, 2]), ([0, 2, 3], None)):
        new = [random_tokens(1 + i, seed=i) for i in order]
        rows = model.forward([BatchEntry(caches[i], t, 1) for i, t in zip(order, new, strict=True)])
        for i, tokens, logits in zip(order, new, rows, strict=True):
            texts[i] = texts[i] + tokens
            torch.testing.assert_close(logits[0], logits_after(reference, texts[i]), **ROUNDING)
        assert told[-1][: len(order)] == skipped if skipped else not told, told
        told.clear()
    assert recorder.num_replays == 3


def test_memory_that_was_never_written_does_not_matter(tiny_model: Callable[..., Model], model: Model) -> None:
    """Not that of the spare page either, where padding is written."""
    pool = model.new_pool(2**18)
    recorded(model, pool)
    for rows in (*pool.keys, *pool.values):
        rows.fill_(torch.nan)
    texts = [random_tokens(length, seed=length) for length in (3, 20, 50)]
    caches = [filled(model, pool, text[:-1]) for text in texts]
    outputs = model.forward([BatchEntry(cache, text[-1:], 1) for cache, text in zip(caches, texts, strict=True)])
    for logits, text in zip(outputs, texts, strict=True):
        torch.testing.assert_close(logits[0], logits_after(tiny_model(), text), **ROUNDING)


def test_a_pass_that_no_graph_holds_runs_eagerly(model: Model, recorder: PretendedRecorder) -> None:
    pool = model.new_pool(2**19)
    runner = recorded(model, pool)
    cache, other = filled(model, pool, []), filled(model, pool, [])
    for entries in (
        [BatchEntry(cache, [1] * (MAX_NEW[-1] + 1), 1)],
        [BatchEntry(cache, [1], 1), BatchEntry(other, [1] * 40, 0)],  # a step beside a prefill chunk
    ):
        assert not is_replayed(runner, entries)
        model.forward(entries)
    assert recorder.num_replays == 0
    model.forward([BatchEntry(filled(model, model.new_pool(2**16), []), [1], 1)])  # a pool of which there are no graphs
    assert recorder.num_replays == 0


def test_a_sequence_longer_than_the_table_runs_eagerly(
    tiny_model: Callable[..., Model], recorder: PretendedRecorder
) -> None:
    model = tiny_model(attention=recorder.attention, window=32)
    pool = model.new_pool(2**18)
    runner = recorded(model, pool)
    cache = pool.open([], 100)
    assert cache is not None
    cache.advance(31)
    assert is_replayed(runner, [BatchEntry(cache, [1], 1)])
    cache.advance(1)
    assert not is_replayed(runner, [BatchEntry(cache, [1], 1)])


def test_what_cannot_be_recorded_runs_eagerly_with_a_warning(
    model: Model, recorder: PretendedRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.fails_at = 3
    pool = model.new_pool(2**18)
    runner = recorded(model, pool)
    assert len(runner.shapes) == 3
    assert "cannot be recorded" in caplog.text and FAILS in caplog.text
    cache = filled(model, pool, [])
    step, draft = [BatchEntry(cache, [1], 1)], [BatchEntry(cache, [1] * 17, 17)]
    assert is_replayed(runner, step) and not is_replayed(runner, draft)
    rows = model.forward(draft)[0]
    torch.testing.assert_close(rows[-1], logits_after(model, [1] * 17), **ROUNDING)


def test_recording_stops_at_its_limits(
    model: Model, recorder: PretendedRecorder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    recorder.bytes_each = 2**20
    runner = recorded(model, model.new_pool(2**18), GraphLimits(gib=5 / 1024))
    assert runner.shapes == set(Shape.all()[:5])
    assert "77 CUDA graphs are not recorded" in caplog.text and "5 CUDA graphs in" in caplog.text
    # The module's own clock alone: threads of other tests look at the process's.
    clock = SimpleNamespace(monotonic=functools.partial(next, itertools.count(0, 10)))
    monkeypatch.setattr(recorded_cuda, "time", clock)
    assert len(recorded(model, model.new_pool(2**18), GraphLimits(seconds=45)).shapes) == 4
    assert not recorded(model, model.new_pool(2**18), GraphLimits(seconds=0)).shapes


def test_graphs_do_not_keep_a_pool_alive(model: Model) -> None:
    pool = model.new_pool(2**18)
    runner = weakref.ref(recorded(model, pool))
    dead = weakref.ref(pool)
    del pool
    gc.collect()
    assert dead() is None and runner() is None


def test_nothing_is_recorded_where_nothing_can_be(
    tiny_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    assert model.record(model.new_pool(2**18), LIMITS) is None  # on a CPU
    pretend_cuda(monkeypatch)
    assert model.record(model.new_pool(2**18), LIMITS) is None
    gathering = tiny_model(attention=PagedAttention(gathered_sdpa, page_size=16))  # it reads whole tables
    assert gathering.record(gathering.new_pool(2**18), LIMITS) is None
