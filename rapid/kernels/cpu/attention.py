"""Attention on a CPU over a ragged batch: the tokens of several sequences in one row, each sequence with its own pages.

There are two attention backends; the model chooses one when it is loaded. `RunAttention` (CPU) reads the cache in
place: a sequence's pages are mostly neighbours, so it multiplies with a few long runs and gathers nothing. For bfloat16
pages it uses a compiled kernel if llvmlite is installed (`rapid.kernels.cpu.attention_plan`).
`rapid.kernels.cuda.attention` (CUDA) reads only device tensors, a block table and lengths, so that a CUDA graph can
capture a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rapid.kernels.cpu.attention_plan import BLOCK_PAGES, QuerySpan, WorkPlan, supports
from rapid.kernels.cpu.rows import rotate, store, store_int8
from rapid.kernels.interface import Batch, BatchEntry, Rotation
from rapid.kernels.prefix import prefix_groups
from rapid.kv_cache.pool import KVLayout, KVPool

_Runs = list[tuple[Tensor, Tensor]]  # keys and values [KV heads, length, d] of neighbouring slots

MANY = 34  # query tokens: from here on products are compute-bound, and other shapes are faster
_SCORE_BYTES = 32 * 2**20  # of one block of scores; it bounds the memory of a long prefill


class RunAttention:
    """The CPU's attention backend: reads runs of neighbouring slots in place.

    Without ``share_prefixes`` every sequence reads all of its pages by itself (`benchmarks.shared_prefix` compares).
    """

    name = "runs"

    def __init__(self, *, share_prefixes: bool = True) -> None:
        self._share_prefixes = share_prefixes

    def pool(self, layout: KVLayout, budget_bytes: int) -> KVPool:
        return KVPool(layout, budget_bytes)

    def batch(self, entries: Sequence[BatchEntry]) -> Batch:
        return RunBatch(entries, share_prefixes=self._share_prefixes)


class RunBatch:
    """One pass over ``pool``; ``slots`` [total] are the slots of the new keys and values."""

    def __init__(self, entries: Sequence[BatchEntry], *, share_prefixes: bool = True) -> None:
        self.pool = entries[0].cache.pool
        self.slots = torch.tensor([slot for cache, tokens, _ in entries for slot in cache.slots(len(tokens))])
        self.is_compiled = supports(self.pool)
        self._plan: WorkPlan | None = None  # of the compiled kernel
        self._spans: list[QuerySpan] = []
        read_only: list[list[int]] = []  # the pages that each sequence may share with others
        start = 0
        for cache, tokens, _ in entries:
            n = len(tokens)
            self._spans.append(QuerySpan(start, n, cache.length + n, cache.pages))
            may_share = share_prefixes and not self._is_split(n)
            read_only.append(cache.pages[: cache.length // self.pool.page_size] if may_share else [])
            start += n
        self._groups = prefix_groups(read_only, BLOCK_PAGES)
        self._shared_runs, self._runs = [], []
        if not self.is_compiled:
            for first, end, num_pages in self._groups:
                shared = num_pages * self.pool.page_size
                self._shared_runs.append(entries[first].cache.runs(shared))
                for (cache, _, _), (_, n, length, _) in zip(entries[first:end], self._spans[first:end], strict=True):
                    self._runs.append(cache.runs(length - n if self._is_split(n) else length, start=shared))

    def _is_split(self, num_new: int) -> bool:
        """Whether cached and new tokens are attended over separately, as PyTorch's blocked kernel needs it.

        It is faster for many tokens, and only in float32.
        """
        return not self.is_compiled and num_new >= MANY and self.pool.layout.dtype == torch.float32

    def plan(self, num_heads: int, scaling: float) -> WorkPlan:
        """The compiled kernel's plan, if there is such a kernel (``is_compiled``); all layers share it."""
        self._plan = self._plan or WorkPlan(self._spans, self._groups, self.pool.layout, num_heads, scaling)
        return self._plan

    def attend(self, layer: int, heads: Tensor, rotation: Rotation, scaling: float) -> Tensor:
        keys, values = self.pool.keys[layer], self.pool.values[layer]  # [KV heads, slots, d]
        num_kv_heads = len(keys)
        num_heads = heads.shape[1] - 2 * num_kv_heads
        heads = rotate(heads, *rotation, num_heads + num_kv_heads)
        query, key, value = heads.split((num_heads, num_kv_heads, num_kv_heads), 1)
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

        def pairs(runs: list[tuple[int, int]]) -> _Runs:
            return [(keys[:, a:b], values[:, a:b]) for a, b in runs]

        for (first, end, num_pages), shared_runs in zip(self._groups, self._shared_runs, strict=True):
            top, last = self._spans[first].row, self._spans[end - 1]
            shared = attend_prefix(query[top : last.row + last.new], pairs(shared_runs)) if num_pages else None
            for (row, n, _, _), runs in zip(self._spans[first:end], self._runs[first:end], strict=True):
                here = slice(row, row + n)
                if self._is_split(n):
                    new_keys, new_values = key[here].transpose(0, 1), value[here].transpose(0, 1)
                    outputs.append(_attend_blocked(query[here], pairs(runs), new_keys, new_values))
                else:
                    before = shared.rows(row - top, row - top + n) if shared else None
                    outputs.append(attend_whole(query[here], pairs(runs), before))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class Part(NamedTuple):
    """Attention over a part of the positions: ``output`` [n, heads, d] (or heads first), and its ``mass`` [n, heads].

    The mass is the logarithm of the sum of the scores' exponentials, in float32; parts are weighted by it.
    """

    output: Tensor
    mass: Tensor

    def rows(self, start: int, end: int) -> Part:
        return Part(self.output[start:end], self.mass[start:end])


def attend_whole(query: Tensor, runs: _Runs, before: Part | None = None) -> Tensor:
    """Causal attention of the last n positions: scaled ``query`` [n, heads, d] over ``runs``, in all of this length.

    Returns [n, heads·d]. ``before`` is the same queries' attention over the positions before the runs. The query heads
    that share a KV head become rows of one matrix, so keys are read once and never repeated. Scores are computed in
    whole rows, a block of rows at a time.
    """
    n, heads, d = query.shape
    length = sum(keys.shape[1] for keys, _ in runs)
    parts = []
    for start, end in _row_blocks(query, length):
        if before is None:
            output, _ = _attend_rows(query[start:end], runs, length - (n - end))
        else:
            part = Part(*_attend_rows(query[start:end], runs, length - (n - end), with_mass=True))
            output = _joined(part, before.rows(start, end)).output
        parts.append(output.reshape(end - start, heads * d))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_prefix(query: Tensor, runs: _Runs) -> Part:
    """Attention of scaled ``query`` [n, heads, d] over all positions of ``runs``."""
    length = sum(keys.shape[1] for keys, _ in runs)
    parts = [
        _attend_rows(query[start:end], runs, length, is_causal=False, with_mass=True)
        for start, end in _row_blocks(query, length)
    ]
    return Part(*map(torch.cat, zip(*parts, strict=True)))


def _row_blocks(query: Tensor, length: int) -> Iterator[tuple[int, int]]:
    n, heads, _ = query.shape
    block = max(1, _SCORE_BYTES // (heads * length * query.itemsize))
    return ((start, min(start + block, n)) for start in range(0, n, block))


def _attend_rows(
    query: Tensor, runs: _Runs, length: int, *, is_causal: bool = True, with_mass: bool = False
) -> tuple[Tensor, Tensor]:
    """`Part` over the first ``length`` positions, of which those of ``query`` are the last if ``is_causal``.

    The mass is empty unless it is asked for.
    """
    n, heads, d = query.shape
    num_kv_heads = runs[0][0].shape[0]
    rows = heads // num_kv_heads * n
    folded = query.reshape(n, num_kv_heads, -1, d).permute(1, 2, 0, 3).reshape(num_kv_heads, rows, d)
    parts = [torch.bmm(folded, keys.transpose(1, 2)) for keys, _ in runs]
    scores = (parts[0] if len(parts) == 1 else torch.cat(parts, 2))[:, :, :length]  # [KV heads, group·n, L]
    if is_causal and n > 1:
        future = torch.ones(n, n, dtype=torch.bool).triu_(1)
        scores.unflatten(1, (-1, n))[..., length - n :].masked_fill_(future, -torch.inf)
    weights = scores.softmax(-1)
    outputs, start = [], 0
    for _, values in runs:
        part = weights[:, :, start : start + values.shape[1]]
        outputs.append(torch.bmm(part, values[:, : part.shape[2]]))
        start += values.shape[1]
    output = outputs[0] if len(outputs) == 1 else torch.stack(outputs).sum(0)
    mass = scores.float().logsumexp(-1) if with_mass else scores.new_empty(0)
    output, mass = (
        each.view(num_kv_heads, -1, n, *each.shape[2:]).movedim(2, 0).flatten(1, 2) if each.numel() else each
        for each in (output, mass)
    )
    return output, mass


def _joined(one: Part, other: Part) -> Part:
    """Attention over both parts' positions."""
    share = torch.sigmoid(other.mass - one.mass).unsqueeze(-1)
    output = torch.lerp(one.output.float(), other.output.float(), share).to(one.output.dtype)
    return Part(output, torch.logaddexp(one.mass, other.mass))


def _attend_blocked(query: Tensor, past: _Runs, key: Tensor, value: Tensor) -> Tensor:
    """`attend_whole` for many tokens: over the ``past`` runs without a mask, over the new [KV heads, n, d] with one.

    Each part is normalised by itself; then the parts are joined.
    """
    n, heads, d = query.shape
    num_kv_heads = key.shape[0]
    blocked = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    by_head = query.transpose(0, 1)  # [heads, n, d]
    group = heads // num_kv_heads
    own_key, own_value = (new.repeat_interleave(group, 0)[None] for new in (key, value))
    output, mass = blocked(by_head[None], own_key, own_value, is_causal=True, scale=1.0)
    whole = Part(output.reshape(heads, n, d), mass.reshape(heads, n))
    folded = by_head.reshape(1, num_kv_heads, group * n, d)
    for keys, values in past:
        output, mass = blocked(folded, keys[None], values[None], scale=1.0)
        whole = _joined(whole, Part(output.reshape(heads, n, d), mass.reshape(heads, n)))
    return whole.output.transpose(0, 1).reshape(n, heads * d)
