"""Writes products of tiles: AMX multiplies 16 rows of 32 numbers in bfloat16 with 16 columns in one instruction.

A thread has eight tiles, each of up to 16 rows of 64 bytes. A tile of columns has a row for each pair of inputs, and in
it the pairs of sixteen outputs: as the packed weights of `rapid.kernels.cpu.linear` lie in memory, and the turned keys
of `rapid.kernels.cpu.attention_ir`.
"""

from __future__ import annotations

from typing import Any

from rapid.kernels.cpu.ir_builder import KernelBuilder, constant, kind, words
from rapid.kernels.cpu.jit import ir

ROWS = 16  # the most of a tile
ROW_BYTES = 64
INPUTS = 32  # of one product, in bfloat16
SIZE = ROWS * ROW_BYTES
TOTALS, FIRST_ROWS, FIRST_COLUMNS = range(0, 4), 4, 6  # tiles of sums; of rows are 4 and 5, of columns 6 and 7


class Tiles:
    """The tiles of the thread that runs the function of ``code``; those of sums and of rows have ``num_rows`` rows."""

    def __init__(self, code: KernelBuilder, num_rows: Any) -> None:
        self._code = code
        shape = code.room(64)
        code.store(constant(words(), None), shape)
        code.store(constant(kind("i8"), 1), shape)  # the only palette
        for i in range(2):
            code.store(code.integer(ROW_BYTES * 0x0001_0001_0001_0001), code.plus(shape, 16 + 8 * i))  # bytes a row
        rows = code.times(num_rows, 0x0000_0101_0101_0101)
        code.store(code.plus(rows, ROWS * 0x0101_0000_0000_0000), code.plus(shape, 48))
        self._do("ldtilecfg", self._pointer(shape))

    def zero(self, tile: int) -> None:
        self._do("tilezero", self._number(tile))

    def load(self, tile: int, address: Any, row_bytes: Any = ROW_BYTES) -> None:
        self._do("tileloadd64", self._number(tile), self._pointer(address), self._code.integer(row_bytes))

    def store(self, tile: int, address: Any, row_bytes: Any = ROW_BYTES) -> None:
        self._do("tilestored64", self._number(tile), self._pointer(address), self._code.integer(row_bytes))

    def multiply(self, total: int, rows: int, columns: int) -> None:
        """Adds the products of ``rows`` and ``columns`` to ``total``, in float32."""
        self._do("tdpbf16ps", *map(self._number, (total, rows, columns)))

    def release(self) -> None:
        """Gives the tiles back: a thread that has some is slower to switch to."""
        self._do("tilerelease")

    def _do(self, name: str, *arguments: Any) -> None:
        self._code.intrinsic(f"llvm.x86.{name}", ir.VoidType(), *arguments)

    def _pointer(self, address: Any) -> Any:
        return self._code.builder.inttoptr(self._code.integer(address), kind("i8").as_pointer())

    def _number(self, tile: int) -> Any:
        return constant(kind("i8"), tile)
