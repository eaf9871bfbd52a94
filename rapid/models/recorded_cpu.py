"""All layers over a few rows, with every kernel's arguments written beforehand, so that a pass only calls kernels.

A decode step calls over three hundred kernels of a few microseconds each. Computing their arguments and output
addresses takes longer than some of them run, so this is done once for each number of rows, and a layer is one call from
Python. The arguments of all calls lie in one table. Only those that describe the pages change from pass to pass.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import Tensor

from rapid.errors import PassAbandoned
from rapid.kernels.cpu.attention import RunBatch
from rapid.kernels.cpu.attention_plan import WorkPlan, attention_kernel
from rapid.kernels.cpu.call_list import Call, CallTable
from rapid.kernels.cpu.jit import COUNTERS, Kernel
from rapid.kernels.cpu.linear import CompiledLinear
from rapid.kernels.cpu.rows import (
    MANY,
    gate_kernel,
    int8_storing_kernel,
    norm_kernel,
    rotation_kernel,
    storing_kernel,
    sum_kernel,
    supports,
)
from rapid.kernels.interface import Batch
from rapid.kv_cache.pool import KVPool
from rapid.models.layers import Heads

if TYPE_CHECKING:
    from rapid.models.layers import Layer, RMSNorm


_DTYPE = torch.bfloat16


class CompiledLayers:
    """The decoder's ``layers``, which must pass `can_record`. It runs one pass at a time, on any thread."""

    def __init__(self, layers: Sequence[Layer], heads: Heads) -> None:
        self._layers, self._heads = layers, heads
        self._passes: dict[tuple[int, int, torch.dtype], CompiledPass] = {}
        self._lock = threading.Lock()

    @staticmethod
    def can_record(layers: Sequence[Layer], heads: Heads) -> bool:
        """Whether every operation of the layers has a kernel, and no kernel pads its rows."""
        products = [product for layer in layers for product in _products(layer)]
        if not all(isinstance(product, CompiledLinear) and not product.pads for product in products):
            return False
        row = torch.empty(0, dtype=_DTYPE)
        return all(supports(row, product.num_inputs) for product in products) and supports(row, heads.d // 2)

    @staticmethod
    def supports(batch: Batch, rows: int) -> TypeGuard[RunBatch]:
        return isinstance(batch, RunBatch) and batch.is_compiled and rows < MANY

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, batch: RunBatch, abandoned: Callable[[], bool]) -> Tensor:
        """``x`` [rows, hidden] behind the last layer; ``cos``, ``sin`` [rows, d].

        Raises:
            PassAbandoned: ``abandoned``, called before every layer, returned True.
        """
        with self.passes(batch.pool) as passes:
            one = passes(len(x))
            one.x.copy_(x)
            one.feed(cos, sin, batch.slots, batch.plan(self._heads.query, self._heads.scaling))
            for layer in one.layers:
                if abandoned():
                    raise PassAbandoned
                layer()
            return one.x.clone()

    @contextmanager
    def passes(self, pool: KVPool) -> Iterator[Callable[[int], CompiledPass]]:
        """Passes over ``pool``, by the number of their rows, as long as the context lasts."""

        def of(rows: int) -> CompiledPass:
            key = rows, torch.get_num_threads(), pool.layout.stored_dtype
            if key not in self._passes:
                self._passes[key] = CompiledPass(self._layers, self._heads, *key)
            self._passes[key].point_to(pool)
            return self._passes[key]

        with self._lock:
            yield of


def _products(layer: Layer) -> tuple[CompiledLinear, CompiledLinear, CompiledLinear, CompiledLinear]:
    """The four products of a layer that passes `CompiledLayers.can_record`."""
    return cast(
        "tuple[CompiledLinear, CompiledLinear, CompiledLinear, CompiledLinear]",
        (layer.qkv, layer.output, layer.gate_up, layer.down),
    )


class CompiledPass:
    """The kernel calls of a pass over ``rows`` rows by ``threads`` threads, and the memory that they use.

    ``x`` [rows, hidden] is read and overwritten. A pass is a call of all ``layers``, or of ``all_layers``.
    """

    def __init__(self, layers: Sequence[Layer], heads: Heads, rows: int, threads: int, stored: torch.dtype) -> None:
        self._stored = stored  # the type of stored keys and values
        self._rows, self._threads, self.heads = rows, threads, heads
        self._calls: list[Call] = []
        self._attending: list[int] = []  # indices of the attention calls, one a layer
        self._storing: list[int] = []  # indices of the calls that store keys; the next call stores values
        self._scratch: list[Tensor] = []
        self._pool: weakref.ref[KVPool] | None = None
        qkv, output, gate_up, down = _products(layers[0])
        self.x, self._normed, self._part = (self._room(qkv.num_inputs) for _ in range(3))
        self._qkv, self._attended = self._room(qkv.num_outputs), self._room(output.num_inputs)
        self._gate_up, self._gated = self._room(gate_up.num_outputs), self._room(down.num_inputs)
        self._cos, self._sin = self._room(heads.d), self._room(heads.d)
        self._slots = torch.empty(rows, dtype=torch.int64)
        ends = [0, *(self._write(layer) for layer in layers)]
        self._table = CallTable(self._calls)
        self.layers = [self._table.part(start, end) for start, end in itertools.pairwise(ends)]
        self.all_layers = self._table.part(0, len(self._calls))

    def feed(self, cos: Tensor, sin: Tensor, slots: Tensor, plan: WorkPlan) -> None:
        """Says where the rows are: their angles [rows, d], the slots [rows] of their keys, and what they attend to."""
        for own, given in ((self._cos, cos), (self._sin, sin), (self._slots, slots)):
            own.copy_(given)
        self._table.reset()
        self._table.words[self._attending, COUNTERS : COUNTERS + len(plan.words)] = plan.words

    def point_to(self, pool: KVPool) -> None:
        """The next passes read and write the pages of ``pool``."""
        if self._pool is not None and self._pool() is pool:
            return
        words = self._table.words
        for i, (keys, values) in enumerate(zip(pool.keys, pool.values, strict=True)):
            # The last arguments of the call; a row of the table may have room for more.
            attending, end = words[self._attending[i]], COUNTERS + len(self._calls[self._attending[i]][2])
            attending[end - 3 : end] = keys.data_ptr(), values.data_ptr(), keys.stride(0) * keys.itemsize
            for call, cache in ((self._storing[i], keys), (self._storing[i] + 1, values)):
                storing, end = words[call], COUNTERS + len(self._calls[call][2])
                storing[end - 2 : end] = cache.data_ptr(), cache.stride(0)
        self._pool = weakref.ref(pool)

    def _write(self, layer: Layer) -> int:
        """Writes a layer's calls; returns the number of calls so far."""
        heads, d = self.heads, self.heads.d
        qkv, output, gate_up, down = _products(layer)
        self._norm(layer.attention_norm, self._rows, self.x, self._normed)
        self._product(qkv, self._normed, self._qkv)
        keys, values = self._qkv[:, heads.query * d :], self._qkv[:, (heads.query + heads.kv) * d :]
        if layer.query_norm is not None and layer.key_norm is not None:
            for row in range(self._rows):
                self._norm(layer.query_norm, heads.query, self._qkv[row], self._qkv[row])
                self._norm(layer.key_norm, heads.kv, keys[row], keys[row])
        rotation = rotation_kernel(_DTYPE, d, heads.query + heads.kv, heads.query + 2 * heads.kv)
        self._call(rotation, 1, self._rows, self._qkv, self._cos, self._sin)
        self._storing.append(len(self._calls))
        is_int8 = self._stored == torch.int8
        for new, is_key in ((keys, True), (values, False)):
            storing = int8_storing_kernel(d, heads.kv, is_key) if is_int8 else storing_kernel(_DTYPE, d, heads.kv)
            self._call(storing, 1, self._rows, new, new.stride(0), self._slots, 0, 0)
        self._attending.append(len(self._calls))
        attention = attention_kernel(self._stored, (heads.kv, heads.query // heads.kv), d, heads.scaling)
        given = self._qkv, self._qkv.stride(0) * self._qkv.itemsize, self._attended, 0, 0, 0
        self._call(attention, self._threads, *WorkPlan.NO_WORDS, *given)
        self._product(output, self._attended, self._part)
        self._add(self.x, self._part)
        self._norm(layer.mlp_norm, self._rows, self.x, self._normed)
        self._product(gate_up, self._normed, self._gate_up)
        self._call(gate_kernel(_DTYPE, self._gated.shape[1]), 1, self._rows, self._gate_up, self._gated)
        self._product(down, self._gated, self._part)
        self._add(self.x, self._part)
        return len(self._calls)

    def _norm(self, norm: RMSNorm, rows: int, x: Tensor, output: Tensor) -> None:
        self._call(norm_kernel(_DTYPE, len(norm.weight), norm.eps), 1, rows, x, output, norm.weight)

    def _product(self, product: CompiledLinear, x: Tensor, output: Tensor) -> None:
        scratch = product.scratch(self._rows)
        self._scratch.append(scratch)
        self._call(product.kernel, self._threads, *product.arguments(x, output, scratch))
        if product.bias is not None:
            self._call(sum_kernel(_DTYPE, product.num_outputs), 1, self._rows, output, product.bias, 0)

    def _add(self, x: Tensor, part: Tensor) -> None:
        self._call(sum_kernel(_DTYPE, x.shape[1]), 1, self._rows, x, part, part.stride(0) * part.itemsize)

    def _call(self, kernel: Kernel, threads: int, *arguments: Tensor | int) -> None:
        words = tuple(a if isinstance(a, int) else a.data_ptr() for a in arguments)
        self._calls.append((kernel, threads, words))

    def _room(self, size: int) -> Tensor:
        return torch.empty(self._rows, size, dtype=_DTYPE)
