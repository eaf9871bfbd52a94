"""Pools of a few small pages, and writing to them as a forward pass does."""

import torch
from running import attended
from torch import Tensor

from rapid.kernels.cpu.attention import RunAttention
from rapid.kernels.interface import BatchEntry
from rapid.kv_cache.pool import KVCache, KVLayout, KVPool

LAYOUT = KVLayout(num_kv_heads=3, head_dim=4, dtype=torch.float32, devices=(torch.device("cpu"),) * 2)
PAGE = 4


def pool_of(num_pages: int) -> KVPool:
    return KVPool(LAYOUT, num_pages * PAGE * LAYOUT.bytes_per_token, page_size=PAGE)


def opened(pool: KVPool, prompt: list[int], capacity: int | None = None) -> KVCache:
    cache = pool.open(prompt, len(prompt) if capacity is None else capacity)
    assert cache is not None
    return cache


def write(cache: KVCache, keys: Tensor) -> None:
    """Writes ``keys`` and their negatives behind what is filled, in every layer, as a forward pass does."""
    new = keys.transpose(0, 1)
    batch = RunAttention().batch([BatchEntry(cache, [0] * len(new), 0)])
    for layer in range(LAYOUT.num_layers):
        attended(batch, new, new, -new, 1.0, layer=layer)
