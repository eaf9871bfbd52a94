"""Reads stored keys back, for what needs them outside of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from rapid.kernels.cpu.int8_attention_ir import BIAS, page_bytes
from rapid.kv_cache.pool import KVPool


def stored_keys(pool: KVPool, layer: int, head: int, pages: Tensor) -> Tensor:
    """The keys of KV head ``head`` in ``pages`` (int64 [n]), in float32: [n, page size, d]."""
    rows = pool.keys[layer].select(1 if pool.slot_major else 0, head)  # [slots, slot size]
    dtype, size, d = rows.dtype, pool.page_size, pool.layout.head_dim
    if dtype == torch.int8:
        # A page's integers are [d / 4, 16 positions, 4], and its scales follow.
        own = rows.reshape(-1, page_bytes(d))[pages.to(rows.device)]
        integers = own[:, : size * d].view(torch.uint8).view(-1, d // 4, size, 4).transpose(1, 2).flatten(2)
        scales = own[:, size * d :].contiguous().view(torch.float32)
        return (integers.float() - BIAS) * scales.unsqueeze(-1)
    # Not every operator knows 8-bit floats, so their bytes are copied.
    whole: Tensor = (rows.view(torch.uint8) if dtype.itemsize == 1 else rows).unflatten(0, (-1, size))
    return whole[pages.to(rows.device)].view(dtype).float()
