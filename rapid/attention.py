"""Attention over a ragged batch: the tokens of several sequences in one row, each sequence with its own KV cache.

transformers calls the registered function in every layer with [1, heads, total tokens, head size] tensors; the batch
itself arrives as a keyword argument that the model passes through untouched.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from rapid.kv_cache import KVCache

NAME = "rapid_ragged"
# From this many query tokens on, a prompt's first chunk is compute-bound and PyTorch's fused causal kernel wins.
FUSED_FROM = 64


class Segment(NamedTuple):
    """``num_tokens`` consecutive tokens of one sequence, to be appended to ``cache``."""

    cache: KVCache
    num_tokens: int


def attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Causal attention of the last n positions: ``query`` [heads, n, d] over ``keys``, ``values`` [KV heads, L, d].

    Returns [n, heads, d]. Query head h reads KV head h // (heads / KV heads).
    """
    heads, n, head_dim = query.shape
    num_kv_heads, length, _ = keys.shape
    if n >= FUSED_FROM and n == length:
        fused = F.scaled_dot_product_attention(
            query[None], keys[None], values[None], is_causal=True, scale=scaling, enable_gqa=True
        )
        return fused[0].transpose(0, 1)
    # The query heads that share a KV head become rows of one matrix: keys are read once and never repeated in memory.
    rows = query.reshape(num_kv_heads, heads // num_kv_heads * n, head_dim)
    scores = torch.bmm(rows, keys.transpose(1, 2)).mul_(scaling)  # [KV heads, group·n, L]
    if n > 1:
        future = torch.ones(n, n, dtype=torch.bool, device=query.device).triu_(1)
        scores.view(heads, n, length)[:, :, length - n :].masked_fill_(future, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
    return torch.bmm(weights, values).view(heads, n, head_dim).transpose(0, 1)


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    segments: list[Segment],
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: writes each segment's keys and values to its cache and attends over it."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    output = query.new_empty(query.shape[2], query.shape[1], query.shape[3])  # [total, heads, d]
    start = 0
    for cache, n in segments:
        here = slice(start, start + n)
        keys, values = cache.write(layer, key[0, :, here], value[0, :, here])
        output[here] = attend(query[0, :, here], keys, values, scaling)
        start += n
    return output[None], None


AttentionInterface.register(NAME, ragged_attention)
# Causality is the function's own business: a mask over [total, total] would cost more than the attention.
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
