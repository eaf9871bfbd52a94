"""Attention on a CPU over a ragged batch: the tokens of several sequences in one row, each sequence with its own pages.

There are two attention backends; the model chooses one when it is loaded. `RunAttention` (CPU) reads the cache in
place: a sequence's pages are mostly neighbours, so it multiplies with a few long runs and gathers nothing. For bfloat16
pages it uses a compiled kernel if llvmlite is installed (`rapid.kernels.cpu.attention_plan`).
`rapid.kernels.cuda.attention` (CUDA) reads only device tensors, a block table and lengths, so that a CUDA graph can
capture a pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rapid.kernels.cpu.attention_plan import QuerySpan, WorkPlan, supports
from rapid.kernels.cpu.rows import store, store_int8
from rapid.kernels.interface import Batch, BatchEntry
from rapid.kv_cache.pool import KVLayout, KVPool

MANY = 34  # query tokens: from here on products are compute-bound, and other shapes are faster
_SCORE_BYTES = 32 * 2**20  # of one block of scores; it bounds the memory of a long prefill


class RunAttention:
    """The CPU's attention backend: reads runs of neighbouring slots in place."""

    name = "runs"

    def pool(self, layout: KVLayout, budget_bytes: int) -> KVPool:
        return KVPool(layout, budget_bytes)

    def batch(self, entries: Sequence[BatchEntry]) -> Batch:
        return RunBatch(entries)


class RunBatch:
    """One pass over ``pool``; ``slots`` [total] are the slots of the new keys and values."""

    def __init__(self, entries: Sequence[BatchEntry]) -> None:
        self.pool = entries[0].cache.pool
        self.slots = torch.tensor([slot for cache, tokens, _ in entries for slot in cache.slots(len(tokens))])
        self.is_compiled = supports(self.pool)
        self._plan: WorkPlan | None = None  # of the compiled kernel
        self._spans, self._runs = [], []
        start = 0
        for cache, tokens, _ in entries:
            n = len(tokens)
            end = cache.length + n
            self._spans.append(QuerySpan(start, n, end, cache.pages))
            # PyTorch's blocked kernel needs the cached and the new tokens separately. It is faster only in float32.
            split = n >= MANY and self.pool.layout.dtype == torch.float32
            self._runs.append((slice(start, start + n), cache.runs(cache.length if split else end), split))
            start += n

    def plan(self, num_heads: int, scaling: float) -> WorkPlan:
        """The compiled kernel's plan, if there is such a kernel (``is_compiled``); all layers share it."""
        self._plan = self._plan or WorkPlan(self._spans, self.pool.layout, num_heads, scaling)
        return self._plan

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys, values = self.pool.keys[layer], self.pool.values[layer]  # [KV heads, slots, d]
        if self.pool.layout.stored_dtype == torch.int8:
            store_int8(key, self.slots, keys, is_key=True)
            store_int8(value, self.slots, values, is_key=False)
        else:
            store(key, self.slots, keys)
            store(value, self.slots, values)
        if self.is_compiled:
            return self.plan(query.shape[1], scaling).attend(query, keys, values)
        query = query * scaling
        outputs = []
        for here, runs, split in self._runs:
            pairs = [(keys[:, a:b], values[:, a:b]) for a, b in runs]
            if split:
                new_keys, new_values = key[here].transpose(0, 1), value[here].transpose(0, 1)
                outputs.append(_attend_blocked(query[here], pairs, new_keys, new_values))
            else:
                outputs.append(attend_whole(query[here], pairs))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attend_whole(query: Tensor, runs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Causal attention of the last n positions: scaled ``query`` [n, heads, d] over [KV heads, length, d] pairs.

    Returns [n, heads·d]. The query heads that share a KV head become rows of one matrix, so keys are read once and
    never repeated. Scores are computed in whole rows, a block of rows at a time.
    """
    n, heads, _ = query.shape
    length = sum(keys.shape[1] for keys, _ in runs)
    block = max(1, _SCORE_BYTES // (heads * length * query.itemsize))
    parts = []
    for start in range(0, n, block):
        end = min(start + block, n)
        parts.append(_attend_rows(query[start:end], runs, length - (n - end)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_rows(query: Tensor, runs: list[tuple[Tensor, Tensor]], length: int) -> Tensor:
    """`attend_whole` over the first ``length`` positions, of which those of ``query`` are the last."""
    n, heads, d = query.shape
    num_kv_heads = runs[0][0].shape[0]
    rows = heads // num_kv_heads * n
    folded = query.reshape(n, num_kv_heads, -1, d).permute(1, 2, 0, 3).reshape(num_kv_heads, rows, d)
    parts = [torch.bmm(folded, keys.transpose(1, 2)) for keys, _ in runs]
    scores = (parts[0] if len(parts) == 1 else torch.cat(parts, 2))[:, :, :length]  # [KV heads, group·n, L]
    if n > 1:
        future = torch.ones(n, n, dtype=torch.bool).triu_(1)
        scores.unflatten(1, (-1, n))[..., length - n :].masked_fill_(future, -torch.inf)
    weights = scores.softmax(-1)
    outputs, start = [], 0
    for _, values in runs:
        part = weights[:, :, start : start + values.shape[1]]
        outputs.append(torch.bmm(part, values[:, : part.shape[2]]))
        start += values.shape[1]
    output = outputs[0] if len(outputs) == 1 else torch.stack(outputs).sum(0)
    return output.view(num_kv_heads, -1, n, d).permute(2, 0, 1, 3).reshape(n, heads * d)


def _attend_blocked(query: Tensor, past: list[tuple[Tensor, Tensor]], key: Tensor, value: Tensor) -> Tensor:
    """`attend_whole` for many tokens: over the ``past`` runs without a mask, over the new [KV heads, n, d] with one.

    Each part is normalised by itself; then the parts are weighted by their log-sum-exp.
    """
    n, heads, d = query.shape
    num_kv_heads = key.shape[0]
    blocked = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    by_head = query.transpose(0, 1)  # [heads, n, d]
    group = heads // num_kv_heads
    own_key, own_value = (new.repeat_interleave(group, 0)[None] for new in (key, value))
    output: Tensor
    output, mass = blocked(by_head[None], own_key, own_value, is_causal=True, scale=1.0)
    output, mass = output.reshape(heads, n, d), mass.reshape(heads, n)
    folded = by_head.reshape(1, num_kv_heads, group * n, d)
    for keys, values in past:
        part, part_mass = blocked(folded, keys[None], values[None], scale=1.0)
        part, part_mass = part.reshape(heads, n, d), part_mass.reshape(heads, n)
        share = torch.sigmoid(part_mass - mass).unsqueeze(-1)
        output = torch.lerp(output.float(), part.float(), share).to(query.dtype)
        mass = torch.logaddexp(mass, part_mass)
    return output.transpose(0, 1).reshape(n, heads * d)
