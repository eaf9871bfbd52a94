"""A pass whose calls were written beforehand gives, bit for bit, what a pass layer by layer gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from running import contents, new_cache, random_tokens
from test_llama import with_random_vectors
from torch import Tensor
from transformers import PreTrainedModel

from rapid.errors import PassAbandoned
from rapid.kernels.cpu import jit
from rapid.kernels.cpu.rows import MANY
from rapid.kernels.interface import BatchEntry
from rapid.kv_cache.pool import KVCache
from rapid.models.model import Model

pytestmark = pytest.mark.skipif(not jit.available(), reason="there are no compiled kernels here")

MakeNetwork = Callable[..., PreTrainedModel]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen2", {}),  # biases on q, k and v
    ("qwen3", {}),  # norms on q and k
]
each_kind = pytest.mark.parametrize(("kind", "more"), KINDS, ids=["llama", "llama with biases", "qwen2", "qwen3"])


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make(tiny_network: MakeNetwork, kind: str = "llama", quantization: str = "none", **more: Any) -> Model:
    network = with_random_vectors(tiny_network(kind=kind, **SIZES | more)).bfloat16()
    return Model(network, None, kind, quantization=quantization)


def by_layer(model: Model) -> Model:
    model._decoder._compiled = None
    return model


def both_ways(model: Model, other: Model, shapes: list[tuple[int, int]]) -> Iterator[tuple[Model, list[KVCache]]]:
    """Each model with a cache for every (tokens before, new tokens), filled alike."""
    for each in (model, other):
        pool = each.new_pool(1000 * each.layout.bytes_per_token)
        caches = []
        for i, (before, _) in enumerate(shapes):
            cache = pool.open([], 200)
            assert cache is not None
            each.forward([BatchEntry(cache, random_tokens(before, seed=i), 0)])
            caches.append(cache)
        yield each, caches


@each_kind
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("shapes", [[(40, 1)], [(17, 3), (100, 1), (33, 2)], [(20, MANY - 1)]], ids=str)
def test_logits_keys_and_values_are_the_same(
    tiny_network: MakeNetwork,
    threads: int,
    kind: str,
    more: dict[str, Any],
    quantization: str,
    shapes: list[tuple[int, int]],
) -> None:
    model, other = (
        make(tiny_network, kind, quantization, **more),
        by_layer(make(tiny_network, kind, quantization, **more)),
    )
    assert model._decoder._compiled is not None
    seen: list[list[Tensor]] = []
    for each, caches in both_ways(model, other, shapes):
        rows: list[Tensor] = []
        for repeat in range(3):  # the first pass writes the calls, the others find them
            new = [random_tokens(count, seed=90 + repeat) for _, count in shapes]
            rows += each.forward([BatchEntry(c, tokens, len(tokens)) for c, tokens in zip(caches, new, strict=True)])
        seen.append([*rows, *(part for cache in caches for part in contents(cache))])
    assert model._decoder._compiled._passes
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_a_pool_takes_the_place_of_another(tiny_network: MakeNetwork) -> None:
    model, other = make(tiny_network), by_layer(make(tiny_network))
    caches = [new_cache(each, 50) for _ in range(3) for each in (model, other)]  # all alive, so at different addresses
    for seed, pair in enumerate(zip(caches[::2], caches[1::2], strict=True)):
        for count in (MANY, 6):  # the first are too many for calls that are written beforehand
            tokens = random_tokens(count, seed)
            rows = [e.forward([BatchEntry(c, tokens, count)])[0] for e, c in zip((model, other), pair, strict=True)]
            assert torch.equal(*rows)


def test_an_abandoned_pass_leaves_no_trace_in_the_next(tiny_network: MakeNetwork) -> None:
    model, other = make(tiny_network), by_layer(make(tiny_network))
    asked = iter([False, True])
    cache = new_cache(model, 50)
    with pytest.raises(PassAbandoned):
        model.forward([BatchEntry(cache, [1, 2, 3], 3)], abandoned=lambda: next(asked))
    assert cache.length == 0
    ours, theirs = (
        e.forward([BatchEntry(c, [4, 5, 6], 3)])[0] for e, c in ((model, cache), (other, new_cache(other, 50)))
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("more", [{"hidden_size": 72}, {"intermediate_size": 72}, {"head_dim": 16}], ids=str)
def test_sizes_without_kernels_go_layer_by_layer(tiny_network: MakeNetwork, more: dict[str, int]) -> None:
    model = make(tiny_network, **more)
    assert model._decoder._compiled is None
    assert model.forward([BatchEntry(new_cache(model, 9), [1, 2], 1)])[0].isfinite().all()
