"""Runs a list of kernels with one call from Python, each with its own arguments and number of threads.

A call from Python takes about a microsecond, and gives up the interpreter's lock and takes it back, behind whichever
thread has it by then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rapid.kernels.cpu.ir_builder import KernelBuilder, constant, kind
from rapid.kernels.cpu.jit import COUNTERS, Kernel, ir

Call = tuple[Kernel, int, int]  # the kernel, where its arguments lie behind their counters, and the number of threads


class CallList:
    """``calls`` in their order, as a function. The arguments' memory must live as long."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._table = np.array([(kernel.address, place, threads) for kernel, place, threads in calls], np.int64)
        self._arguments = np.array([*[0] * COUNTERS, self._table.ctypes.data, len(calls)], np.int64)
        self._run: Callable[[], object] = _list_kernel().bound(self._arguments.ctypes.data)

    def __call__(self) -> None:
        self._run()


@functools.cache
def _list_kernel() -> Kernel:
    return Kernel("call-list", _write, __file__)


def _write(module: Any) -> None:
    code = KernelBuilder(module, "kernel", 1)
    builder, pointer, number = code.builder, kind("i8").as_pointer(), kind("i32")
    kernel = ir.FunctionType(ir.VoidType(), [kind("i64")])
    parallel = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer, pointer, number, number]), "GOMP_parallel")
    (data,) = code.parameters
    table, count = (code.word(data, COUNTERS + i) for i in range(2))
    with code.loop(0, count) as i:
        entry = code.plus(table, code.times(i, 24))
        address, arguments, threads = (code.word(entry, part) for part in range(3))
        with builder.if_else(builder.icmp_signed("==", threads, code.integer(1))) as (alone, together):
            with alone:
                builder.call(builder.inttoptr(address, kernel.as_pointer()), [arguments])
            with together:
                pointers = [builder.inttoptr(each, pointer) for each in (address, arguments)]
                builder.call(parallel, [*pointers, builder.trunc(threads, number), constant(number, 0)])
    code.finish()
