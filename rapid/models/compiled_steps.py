"""Passes of one sequence in which each token comes from the one before it: a pass is two calls from Python.

What a pass needs and does not depend on the token before it, such as slots and angles, is computed for all of them at
once. The calls behind the layers are the last norm, the head, and one that draws the next token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from rapid.errors import PassAbandoned
from rapid.kernels.cpu.attention_plan import QuerySpan, WorkPlan, supports
from rapid.kernels.cpu.call_list import CallTable
from rapid.kernels.cpu.jit import COUNTERS, Kernel
from rapid.kernels.cpu.linear import CompiledLinear
from rapid.kernels.cpu.rows import MANY, norm_kernel
from rapid.kernels.interface import Tokens
from rapid.kernels.prefix import PrefixGroup
from rapid.kernels.transfer import upload
from rapid.kv_cache.table import PageTable
from rapid.models.draft_head import DraftHead
from rapid.models.layers import RMSNorm
from rapid.models.recorded_cpu import CompiledLayers, CompiledPass

_DTYPE = torch.bfloat16


class Drawer(Protocol):
    """Draws the tokens: ``kernel`` with the ``arguments`` of a step, once the head has written ``logits`` [V or N]."""

    kernel: Kernel

    def arguments(self, step: int, logits: Tensor) -> tuple[int, ...]: ...

    def drawn(self, step: int) -> Tensor | None:
        """The token [1] that the kernel drew in ``step``; None if no other shall follow."""


class CompiledSteps:
    """Steps through ``layers``, between ``embedding`` [V, hidden] and ``norm`` with ``head``.

    ``rotary`` gives the angles of positions. Steps run on any thread, those of one sequence at a time.
    """

    def __init__(
        self, layers: CompiledLayers, embedding: Tensor, rotary: Callable[..., Any], norm: RMSNorm, head: CompiledLinear
    ) -> None:
        self._layers, self._embedding, self._rotary, self._norm, self._head = layers, embedding, rotary, norm, head

    def head(self, own: DraftHead | None) -> CompiledLinear:
        """The output layer of a sequence with a draft head of its ``own``, or with none."""
        return self._head if own is None else own.rows

    def supports(self, cache: PageTable, feed: Tokens, head: CompiledLinear) -> bool:
        """Whether there are kernels for the pages, for a pass of so many tokens, and for the output layer."""
        return supports(cache.pool) and len(feed) < MANY and not head.pads and head.bias is None

    def run(
        self,
        cache: PageTable,
        feed: Tokens,
        head: CompiledLinear,
        drawer: Drawer,
        num_steps: int,
        abandoned: Callable[[], bool],
    ) -> int:
        """Reads ``feed``, then at most ``num_steps`` - 1 tokens; returns the number of passes. The cache stays as long.

        Raises:
            PassAbandoned: ``abandoned``, called before every pass, returned True.
        """
        tokens = feed if isinstance(feed, Tensor) else torch.tensor(feed)
        rows, most = len(tokens), len(tokens) + num_steps - 1
        slots = torch.tensor(cache.slots(most))
        positions = upload(range(cache.position, cache.position + most), "int64", tokens.device)
        cos, sin = (angles[0] for angles in self._rotary(self._embedding[:1], positions[None]))
        logits = torch.empty(head.num_outputs, dtype=_DTYPE)
        one: CompiledPass | None = None
        plan: WorkPlan | None = None
        start = 0
        with self._layers.passes(cache.pool) as passes:
            for step in range(num_steps):
                if abandoned():
                    raise PassAbandoned
                end, before = start + rows, one
                one = passes(rows)
                if one is not before:
                    last = _LastCalls(one, self._norm, head, drawer, logits)
                if one is not before or plan is None or not plan.extend(cache.length + end):
                    span = QuerySpan(0, rows, cache.length + end, cache.pages)
                    plan = WorkPlan(
                        [span], [PrefixGroup(0, 1, 0)], cache.pool.layout, one.heads.query, one.heads.scaling
                    )
                torch.index_select(self._embedding, 0, tokens, out=one.x)
                one.feed(cos[start:end], sin[start:end], slots[start:end], plan)
                one.all_layers()
                last(step)
                following = drawer.drawn(step)
                if following is None:
                    return step + 1
                tokens, rows, start = following, 1, end
        return num_steps


class _LastCalls:
    """The calls behind the layers of a pass, for its last row."""

    def __init__(self, one: CompiledPass, norm: RMSNorm, head: CompiledLinear, drawer: Drawer, logits: Tensor) -> None:
        x, self._drawer, self._logits = one.x[-1], drawer, logits
        self._normed, self._scratch = torch.empty(1, len(x), dtype=_DTYPE), head.scratch(1)
        arguments = drawer.arguments(0, logits)
        self._table = CallTable(
            [
                (
                    norm_kernel(_DTYPE, len(x), norm.eps),
                    1,
                    (1, x.data_ptr(), self._normed.data_ptr(), norm.weight.data_ptr()),
                ),
                (head.kernel, torch.get_num_threads(), head.arguments(self._normed, logits, self._scratch)),
                (drawer.kernel, 1, arguments),
            ]
        )
        self._run = self._table.part(0, 3)
        self._end = COUNTERS + len(arguments)

    def __call__(self, step: int) -> None:
        self._table.reset()
        self._table.words[2, COUNTERS : self._end] = self._drawer.arguments(step, self._logits)
        self._run()
