"""Runs a list of kernels with one call from Python, each with its own arguments and number of threads.

A call from Python takes about a microsecond, and gives up the interpreter's lock and takes it back, behind whichever
thread has it by then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rapid.kernels.cpu.ir_builder import KernelBuilder, constant, kind
from rapid.kernels.cpu.jit import COUNTERS, Kernel, ir

Call = tuple[Kernel, int, tuple[int, ...]]  # the kernel, the number of threads, and the arguments


class CallTable:
    """``calls`` in their order; ``words`` [calls, COUNTERS + most arguments] holds their arguments behind the counters.

    The arguments may be changed, between two runs. Before each run the counters must be 0.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        width = max(len(arguments) for _, _, arguments in calls)
        self.words = np.zeros((len(calls), COUNTERS + width), np.int64)
        for line, (_, _, arguments) in zip(self.words, calls, strict=True):
            line[COUNTERS : COUNTERS + len(arguments)] = arguments
        entries = [
            (kernel.address, line.ctypes.data, threads)
            for line, (kernel, threads, _) in zip(self.words, calls, strict=True)
        ]
        self._entries = np.array(entries, np.int64)

    def part(self, start: int, end: int) -> CallList:
        """The calls from ``start`` to before ``end``."""
        return CallList(self, self._entries[start:end])

    def reset(self) -> None:
        """Makes the counters 0."""
        self.words[:, :COUNTERS] = 0


class CallList:
    """Some calls of a `CallTable`, as a function."""

    def __init__(self, table: CallTable, entries: NDArray[np.int64]) -> None:
        self._memory = table, np.array([*[0] * COUNTERS, entries.ctypes.data, len(entries)], np.int64)
        self._run: Callable[[], object] = _list_kernel().bound(self._memory[1].ctypes.data)

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
