"""Ragged attention over per-sequence caches is ordinary causal attention."""

import math
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rapid.attention import FUSED_FROM, attend
from rapid.kv_cache import KVCache, KVLayout
from rapid.model import Model

MakeModel = Callable[..., Model]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def plain_attention(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """In float64, one query at a time: the last one sees all keys, the one before all but the last, and so on."""
    heads, n, head_dim = query.shape
    length = keys.shape[1]
    output = torch.empty(n, heads, head_dim, dtype=torch.float64)
    for head in range(heads):
        group = head * keys.shape[0] // heads
        for i in range(n):
            visible = slice(0, length - n + i + 1)
            weights = (keys[group, visible].double() @ query[head, i].double() * scaling).softmax(-1)
            output[i, head] = weights @ values[group, visible].double()
    return output.float()


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 11, 33, FUSED_FROM - 1, FUSED_FROM, 90])
@pytest.mark.parametrize("cached", [0, 1, 50])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (1, 9), (2, 2), (3, 3), (4, 1)])
def test_attend_equals_plain_attention(num_tokens: int, cached: int, kv_heads: int, group: int) -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(kv_heads * group, num_tokens, 8, generator=generator)
    keys, values = torch.randn(2, kv_heads, cached + num_tokens, 8, generator=generator)
    torch.testing.assert_close(
        attend(query, keys, values, 0.35), plain_attention(query, keys, values, 0.35), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("num_tokens", [1, 11])
def test_attend_over_a_long_cache(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(6, num_tokens, 8, generator=generator)
    keys, values = torch.randn(2, 2, 3000, 8, generator=generator)
    torch.testing.assert_close(
        attend(query, keys, values, 1.0), plain_attention(query, keys, values, 1.0), rtol=1e-5, atol=1e-5
    )


def random_tokens(length: int, seed: int) -> list[int]:
    return torch.randint(32, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_a_ragged_batch_equals_each_sequence_alone(tiny_model: MakeModel) -> None:
    """Sequences of any lengths, some beginning and some going on, do not see each other."""
    model = tiny_model()
    cached, new = (0, 7, 40, 0, 100), (9, 1, 4, 80, 70)
    together: list[KVCache] = []
    segments, alone = [], []
    for i, (before, n) in enumerate(zip(cached, new, strict=True)):
        tokens = random_tokens(before + n, seed=i)
        caches = model.new_cache(200), model.new_cache(200)
        for cache in caches:
            if before:
                model.forward([(cache, tokens[:before], 0)])
        num_rows = min(n, 3)
        segments.append((caches[0], tokens[before:], num_rows))
        alone.append((caches[1], model.forward([(caches[1], tokens[before:], num_rows)])[0]))
        together.append(caches[0])
    for rows, cache, (lone_cache, lone_rows) in zip(model.forward(segments), together, alone, strict=True):
        torch.testing.assert_close(rows, lone_rows, **CLOSE)
        filled = cache.length
        assert filled == lone_cache.length
        torch.testing.assert_close(cache.keys[:, :, :filled], lone_cache.keys[:, :, :filled], **CLOSE)
        torch.testing.assert_close(cache.values[:, :, :filled], lone_cache.values[:, :, :filled], **CLOSE)


@pytest.mark.parametrize("chunks", [[120], [1, 119], [64, 40, 16], [50, 1, 1, 68]])
def test_forward_equals_transformers_own(tiny_model: MakeModel, chunks: list[int]) -> None:
    """The logits of a prefill in chunks and of decoding one by one are those of transformers' sdpa attention."""
    model = tiny_model()
    theirs = AutoModelForCausalLM.from_config(deepcopy(model.network.config), attn_implementation="sdpa").eval()
    theirs.load_state_dict(model.network.state_dict())
    tokens = random_tokens(sum(chunks) + 8, seed=1)
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
    cache, rows, done = model.new_cache(len(tokens)), [], 0
    for n in [*chunks, *[1] * 8]:
        rows.append(model.forward([(cache, tokens[done : done + n], n)])[0])
        done += n
    torch.testing.assert_close(torch.cat(rows), expected, **CLOSE)


def test_only_the_wanted_rows_come_back(tiny_model: MakeModel) -> None:
    model = tiny_model()
    tokens = random_tokens(20, seed=2)
    whole = model.forward([(model.new_cache(20), tokens, 20)])[0]
    none, last, three = model.forward([(model.new_cache(20), tokens, num_rows) for num_rows in (0, 1, 3)])
    assert none.shape == (0, 32)
    torch.testing.assert_close(last, whole[-1:], **CLOSE)
    torch.testing.assert_close(three, whole[-3:], **CLOSE)


LAYOUT = KVLayout(num_layers=2, num_kv_heads=3, head_dim=4, dtype=torch.float32, device=torch.device("cpu"))


def rows(start: int, n: int) -> Tensor:
    """``n`` rows that tell their position: [KV heads, n, head size]."""
    return torch.arange(start, start + n, dtype=torch.float32)[None, :, None].expand(3, n, 4)


def test_a_cache_is_written_behind_what_is_filled_and_cut_by_its_length() -> None:
    cache = KVCache(LAYOUT, 10)
    for layer in range(2):
        keys, values = cache.write(layer, rows(0, 6), -rows(0, 6))
    assert cache.length == 0  # an interrupted pass leaves the cache as it was
    cache.advance(6)
    torch.testing.assert_close(keys, rows(0, 6))
    torch.testing.assert_close(values, -rows(0, 6))

    cache.truncate(4)
    for layer in range(2):
        keys, values = cache.write(layer, rows(100, 3), -rows(100, 3))
        torch.testing.assert_close(keys, torch.cat([rows(0, 4), rows(100, 3)], 1))
        torch.testing.assert_close(values, -keys)
    cache.advance(3)
    cache.truncate(9)
    assert cache.length == 7  # rolling back never goes forward


@pytest.mark.parametrize(("filled", "new"), [(10, 1), (9, 2), (0, 11)])
def test_a_full_cache_refuses_to_be_written(filled: int, new: int) -> None:
    """One row too many must not be dropped in silence: attention would then miss the newest token."""
    cache = KVCache(LAYOUT, 10)
    cache.advance(filled)
    with pytest.raises(ValueError, match=f"10 tokens.*{filled + new}"):
        cache.write(0, rows(0, new), rows(0, new))


def test_a_cache_takes_the_memory_it_says() -> None:
    cache = KVCache(LAYOUT, 10)
    assert LAYOUT.bytes_per_token == 2 * 2 * 3 * 4 * 4
    assert cache.nbytes == 10 * LAYOUT.bytes_per_token
    assert math.prod(cache.keys.shape) * 4 * 2 == cache.nbytes
