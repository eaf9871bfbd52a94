"""Whole passes over keys and values that are stored with 8 bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from running import new_cache, random_tokens
from test_llama import with_random_vectors
from transformers import PreTrainedModel

from rapid.kernels.cpu import jit
from rapid.kernels.cuda.attention import PagedAttention, gathered_sdpa
from rapid.kernels.interface import BatchEntry
from rapid.models.model import Model

MakeNetwork = Callable[..., PreTrainedModel]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
compiled = pytest.mark.skipif(not jit.available(), reason="there are no compiled kernels here")


@pytest.fixture
def make(tiny_network: MakeNetwork) -> Callable[..., Model]:
    def make(kv_dtype: str, kind: str = "llama", **more: Any) -> Model:
        network = with_random_vectors(tiny_network(kind=kind, **SIZES | more)).bfloat16()
        return Model(network, None, kind, kv_dtype=kv_dtype)

    return make


@compiled
def test_recorded_passes_over_int8_pages_are_those_layer_by_layer(make: Callable[..., Model]) -> None:
    """Bit for bit, with a prefill before them and a rollback between."""
    seen = []
    for model in (make("int8"), make("int8")):
        if seen:
            model._decoder._compiled = None
        cache, rows = new_cache(model, 100), []
        for tokens in (random_tokens(40, 1), random_tokens(5, 2), random_tokens(1, 3)):
            rows.append(model.forward([BatchEntry(cache, tokens, len(tokens))])[0])
            cache.truncate(cache.length - 1)
        seen.append(torch.cat(rows))
    assert torch.equal(*seen)


@compiled
def test_a_shared_prefix_and_a_rollback_change_nothing(make: Callable[..., Model]) -> None:
    model = make("int8")
    tokens = random_tokens(60, 1)
    alone = model.forward([BatchEntry(new_cache(model, 60), tokens, 1)])[0]
    pool = model.new_pool(300 * model.layout.bytes_per_token)
    first = pool.open(tokens, 60)
    assert first is not None
    model.forward([BatchEntry(first, tokens[:48], 0)])
    pool.insert(first, tokens, 48)
    second = pool.open(tokens, 60)
    assert second is not None and second.length == 48
    model.forward([BatchEntry(second, random_tokens(7, 2), 0)])
    second.truncate(48)
    torch.testing.assert_close(model.forward([BatchEntry(second, tokens[48:], 1)])[0], alone, rtol=0, atol=2e-2)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_fp8_scales_weights_and_leaves_the_function_as_it_is(tiny_network: MakeNetwork, kind: str) -> None:
    """Keys and values of any size fit: here they are thousands of times what e4m3 holds."""

    def network() -> PreTrainedModel:
        made = with_random_vectors(tiny_network(kind=kind, **SIZES))
        for layer in made.model.layers:
            attention = layer.self_attn
            for factor, part in ((3e4, attention.v_proj), (1e4, attention.k_proj)):
                part.weight.data.mul_(factor)
            for part in (attention.q_proj, attention.o_proj):
                for parameter in part.parameters():
                    parameter.data.mul_(1e-4)
        return made

    tokens = random_tokens(40, 1)
    backend = PagedAttention(gathered_sdpa, page_size=16)
    rows = []
    for kv_dtype in ("auto", "fp8"):
        model = Model(network(), None, kind, kv_dtype=kv_dtype, attention=backend)
        cache = new_cache(model, 60)
        for part in (tokens[:30], tokens[30:35], tokens[35:]):
            rows.append(model.forward([BatchEntry(cache, part, len(part))])[0])
        if kv_dtype == "fp8":
            slots = [slot for first, last in cache.runs(cache.length) for slot in range(first, last)]
            stored = torch.stack([*cache.pool.keys, *cache.pool.values]).float()[:, slots]
            assert stored.abs().amax() > 4 and not stored.isnan().any()
    expected, actual = torch.cat(rows[:3]), torch.cat(rows[3:])
    distance = (actual - expected).norm() / expected.norm()
    assert 1e-5 < distance < 0.1
