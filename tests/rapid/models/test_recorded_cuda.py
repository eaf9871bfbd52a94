"""Static buffers, filled anew for every pass, give what a pass made for the occasion gives."""

from collections.abc import Callable

import pytest
import torch
from running import ROUNDING, logits_after, random_tokens

from rapid.kernels.cuda.attention import PagedAttention, gathered_sdpa
from rapid.kernels.interface import BatchEntry
from rapid.kv_cache.pool import KVCache, KVPool
from rapid.models.model import Model
from rapid.models.recorded_cuda import MAX_NEW_TOKENS, MAX_SEQUENCES, GraphRunner

KERNEL = PagedAttention(gathered_sdpa, page_size=16)


@pytest.fixture
def model(tiny_model: Callable[..., Model]) -> Model:
    """Passes of a repeating shape go through a GraphRunner, the others do not."""
    return tiny_model(attention=KERNEL)


def filled(model: Model, pool: KVPool, tokens: list[int]) -> KVCache:
    cache = pool.open([], len(tokens) + 80)
    assert cache is not None
    if tokens:
        model.compute([BatchEntry(cache, tokens, 0)])
        cache.advance(len(tokens))
    return cache


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("num_new", [1, 2, MAX_NEW_TOKENS])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_replayed_passes_equal_eager_ones(
    tiny_model: Callable[..., Model], model: Model, count: int, num_new: int, as_tensor: bool
) -> None:
    """Round after round, with as many sequences or fewer in the same buffers, padded to a power of two."""
    reference, pool = tiny_model(), model.new_pool(2**18)
    texts = [random_tokens(length, seed=length) for length in (0, 20, 33)][:count]
    caches = [filled(model, pool, text) for text in texts]
    for taking in (count, count, max(1, count - 1), count):
        new = [random_tokens(num_new, seed=i + len(texts[i])) for i in range(taking)]
        entries = [
            BatchEntry(cache, torch.tensor(tokens) if as_tensor else tokens, num_rows)
            for cache, tokens, num_rows in zip(caches, new, (1, num_new, 0), strict=False)
        ]
        assert model._graphs is not None and model._graphs.supports(entries)
        rows = model.forward(entries)
        for i, tokens in enumerate(new):
            texts[i] = texts[i] + tokens
            assert (caches[i].length, len(rows[i])) == (len(texts[i]), entries[i].num_rows)
            if len(rows[i]):
                torch.testing.assert_close(rows[i][-1], logits_after(reference, texts[i]), **ROUNDING)
        if num_new > 2:  # as a rejected draft is rolled back
            for i in range(taking):
                texts[i] = texts[i][:-3]
                caches[i].truncate(len(texts[i]))
    for cache, text in zip(caches, texts, strict=True):  # and nobody's past was written to
        cache.truncate(len(text) - 1)
        logits = model.compute([BatchEntry(cache, text[-1:], 1)])[0]
        torch.testing.assert_close(logits, logits_after(reference, text), **ROUNDING)


def test_only_few_tokens_as_many_for_each_are_worth_a_graph(model: Model) -> None:
    runner = model._graphs
    assert isinstance(runner, GraphRunner)
    cache = filled(model, model.new_pool(2**16), [])

    def supports(*lengths: int) -> bool:
        return runner.supports([BatchEntry(cache, [0] * length, 1) for length in lengths])

    assert supports(1)
    assert supports(*[MAX_NEW_TOKENS] * MAX_SEQUENCES)
    assert not supports(1, 2)
    assert not supports(MAX_NEW_TOKENS + 1)
    assert not supports(*[1] * (MAX_SEQUENCES + 1))


def test_memory_that_was_never_written_does_not_matter(tiny_model: Callable[..., Model], model: Model) -> None:
    """Not that of the spare page either, which padding reads."""
    pool = model.new_pool(2**18)
    for rows in (*pool.keys, *pool.values):
        rows.fill_(torch.nan)
    texts = [random_tokens(length, seed=length) for length in (3, 20, 50)]
    caches = [filled(model, pool, text[:-1]) for text in texts]
    outputs = model.forward([BatchEntry(cache, text[-1:], 1) for cache, text in zip(caches, texts, strict=True)])
    for logits, text in zip(outputs, texts, strict=True):
        torch.testing.assert_close(logits[0], logits_after(tiny_model(), text), **ROUNDING)
