"""Writes the LLVM code of the attention over 8-bit pages, and of storing keys and values in them.

A stored key or value is d integers and one scale, its largest magnitude over 127. The integers of a page lie as the
instruction for groups of four products (VNNI) reads them, so nothing is turned or widened when they are read:

* keys: [d/4, 16 positions, 4] unsigned, 128 more than the number; then 16 scales in float32
* values: [4, d, 4 positions] signed; then 16 scales

Both operands of that instruction have 8 bits. Queries are rounded to 8 bits as keys are. A weight times its value's
scale is rounded to 16 bits and multiplied in two halves: with 8 bits, the many small weights beside a large one would
be lost (as in SageAttention, arXiv 2410.02367, which rounds queries and keys to 8 bits and weights to 16).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rapid.kernels.cpu.attention_ir import BLOCK, Attention
from rapid.kernels.cpu.ir_builder import (
    LANES,
    KernelBuilder,
    constant,
    every_float,
    every_word,
    floats,
    kind,
    words,
)
from rapid.kv_cache.pool import INT8_SCALE_BYTES

_AHEAD = 8  # pages to prefetch
BIAS = 128  # of stored keys
_STEPS = 127.0  # of a stored number, and of a number of the query
_WEIGHT_STEPS = 65535.0
# A number below 2²² that is added to this is rounded: the bits are those of the sum's, more by the integer.
_ROUND, _ROUND_BITS = 1.5 * 2**23, 0x4B400000
_TINY = 1e-30  # instead of a scale of 0


def page_bytes(d: int) -> int:
    """Bytes of the keys, or of the values, of a page in one KV head."""
    return LANES * (d + INT8_SCALE_BYTES)


class Int8Scratch:
    """The layout of a thread's memory; offsets in bytes."""

    def __init__(self, rows: int, d: int) -> None:
        self.factors = 0  # [block] float32: the values' scales, relative to the largest; 0 behind the last position
        self.steps = self.factors + BLOCK * 4  # float32: the largest scale over the steps of a weight
        self.rows = self.steps + 64
        # Offsets in a line, of which each of ``rows`` rows has one. Scores come first, then weights.
        self.query = BLOCK * 4  # [d] 8-bit integers
        self.query_factor = self.query + d  # float32
        self.bias = self.query_factor + 4  # int32: what the keys' bias adds to a product, negated
        self.line = self.query + d + 64
        self.size = self.rows + rows * self.line


class Int8Attention(Attention):
    """Writes the kernel. It differs from that over bfloat16 pages in an item of work, and merges items as that does."""

    name = "int8"

    @staticmethod
    def scratch_bytes(rows: int, d: int) -> int:
        return Int8Scratch(rows, d).size

    def _item(self) -> Callable[..., None]:
        query_rows, scale, weights = self._round_query(), self._scale_values(), self._int8_weights()
        sizes = range(1, 5)
        scores, sums = [self._int8_scores(size) for size in sizes], [self._int8_sums(size) for size in sizes]

        def calls(code: KernelBuilder, given: dict[str, Any], own: dict[str, Any], scratch: Any) -> None:
            rows = code.times(own["new"], self._group)
            head = code.times(own["head"], given["head_bytes"])
            pages = code.plus(given["pages"], code.times(own["pages"], 8))
            keys, values = code.plus(given["keys"], head), code.plus(given["values"], head)
            row_bytes = given["query_bytes"]
            query = code.plus(given["query"], self._at(code, own["row"], own["head"], row_bytes))
            partial = code.plus(given["partials"], code.times(own["partial"], self._partial_bytes))
            code.call(query_rows, rows, query, row_bytes, scratch)
            with code.loop(own["first"], own["last"], LANES) as position:
                page = code.plus(keys, self._page(code, pages, position))
                code.prefetch(code.plus(page, _AHEAD * page_bytes(self._d)), page_bytes(self._d))
                column = code.times(code.builder.sub(position, own["first"]), 4)
                with code.tiles(rows, 4) as (row, size):
                    code.choose(scores, size, row, page, scratch, column)
            seen = (own["first"], own["last"], own["length"], own["new"])
            code.call(scale, scratch, own["first"], own["last"], values, pages)
            code.call(weights, scratch, rows, *seen, partial)
            with code.tiles(rows, 4) as (row, size):
                code.choose(sums, size, row, scratch, values, pages, own["first"], own["last"], partial)

        return calls

    def _page(self, code: KernelBuilder, pages: Any, position: Any) -> Any:
        page = code.word(code.plus(pages, code.times(code.divided(position, LANES), 8)))
        return code.times(page, page_bytes(self._d))

    def _line(self, code: KernelBuilder, scratch: Any, row: Any) -> Any:
        offsets = Int8Scratch(0, self._d)
        return code.plus(scratch, offsets.rows, code.times(row, offsets.line))

    def _round_query(self) -> Any:
        """(rows, query, its bytes a row, scratch): every row of the query in 8 bits."""
        code = KernelBuilder(self._module, "query", 4)
        rows, query, row_bytes, scratch = code.parameters
        offsets = Int8Scratch(0, self._d)
        with code.loop(0, rows) as row:
            line = self._line(code, scratch, row)
            integers, factor = _rounded(code, code.plus(query, self._row(code, row, row_bytes)), self._d)
            total = every_word(0)
            for i, part in enumerate(integers):
                code.store(code.builder.trunc(part, kind("i8", LANES)), code.plus(line, offsets.query + i * LANES))
                total = code.builder.add(total, part)
            code.store(factor, code.plus(line, offsets.query_factor))
            bias = code.intrinsic("llvm.vector.reduce.add.v16i32", kind("i32"), total)
            code.store(code.builder.mul(bias, constant(kind("i32"), -BIAS)), code.plus(line, offsets.bias))
        return code.finish()

    def _int8_scores(self, num_rows: int) -> Any:
        """(row, page of keys, scratch, column's offset): products of a page's keys with ``num_rows`` rows."""
        code = KernelBuilder(self._module, f"scores{num_rows}", 4)
        row, page, scratch, column = code.parameters
        offsets = Int8Scratch(0, self._d)
        lines = [self._line(code, scratch, code.plus(row, i)) for i in range(num_rows)]
        # Two sums a row: each product must wait for the one before it in its sum.
        totals = [[code.splat(code.load(kind("i32"), code.plus(line, offsets.bias))), every_word(0)] for line in lines]
        for i in range(self._d // 4):
            key = code.load(words(), code.plus(page, i * LANES * 4))
            for line, total in zip(lines, totals, strict=True):
                query = code.splat(code.load(kind("i32"), code.plus(line, offsets.query + i * 4)))
                total[i % 2] = code.dot4(total[i % 2], key, query)
        scales = code.load(floats(), code.plus(page, LANES * self._d))
        for line, (even, odd) in zip(lines, totals, strict=True):
            factor = code.splat(code.load(kind("f32"), code.plus(line, offsets.query_factor)))
            product = code.builder.sitofp(code.builder.add(even, odd), floats())
            code.store(code.builder.fmul(code.builder.fmul(product, scales), factor), code.plus(line, column))
        return code.finish()

    def _scale_values(self) -> Any:
        """(scratch, first, last, values, pages): the factors of a block's weights.

        A weight is at most 1, so that weight times factor is at most the steps of a weight.
        """
        code = KernelBuilder(self._module, "scale", 5)
        scratch, first, last, values, pages = code.parameters
        offsets = Int8Scratch(0, self._d)
        factors = code.plus(scratch, offsets.factors)
        lanes, narrow = constant(words(), list(range(LANES))), kind("i32")
        largest = code.variable(every_float(_TINY))
        with code.loop(first, last, LANES) as position:
            page = code.plus(values, self._page(code, pages, position))
            # Scales behind the last position were never written, and may be NaN.
            left = code.splat(code.builder.trunc(code.builder.sub(last, position), narrow))
            written = code.builder.icmp_signed("<", lanes, left)
            scales = code.builder.select(
                written, code.load(floats(), code.plus(page, LANES * self._d)), every_float(0.0)
            )
            code.store(scales, code.plus(factors, code.times(code.builder.sub(position, first), 4)))
            largest.value = code.intrinsic("llvm.maxnum.v16f32", floats(), largest.value, scales)
        most = code.intrinsic("llvm.vector.reduce.fmax.v16f32", kind("f32"), largest.value)
        steps = constant(kind("f32"), _WEIGHT_STEPS)
        code.store(code.builder.fdiv(most, steps), code.plus(scratch, offsets.steps))
        factor = code.splat(code.builder.fdiv(steps, most))
        with code.loop(0, code.builder.sub(last, first), LANES) as column:
            place = code.plus(factors, code.times(column, 4))
            code.store(code.builder.fmul(code.load(floats(), place), factor), place)
        return code.finish()

    def _int8_weights(self) -> Any:
        """(scratch, rows, first, last, length, new, partial): scores to weights times factors, as integers.

        Each sixteen weights become sixteen high and sixteen low halves.
        """
        code = KernelBuilder(self._module, "weights", 7)
        scratch, rows, first, last, length, new, partial = code.parameters
        factors = code.plus(scratch, Int8Scratch(0, self._d).factors)
        width = code.builder.sub(last, first)
        with code.loop(0, rows) as row:
            line = self._line(code, scratch, row)
            top = self._largest_score(code, line, row, first, width, length, new)
            total = code.variable(every_float(0.0))
            with code.loop(0, width, LANES) as column:
                # Halves take half the room of scores, so they never overwrite scores that are still needed.
                weight = self._weight(code, code.load(floats(), code.plus(line, code.times(column, 4))), top)
                total.value = code.builder.fadd(total.value, weight)
                factor = code.load(floats(), code.plus(factors, code.times(column, 4)))
                whole = code.builder.bitcast(code.fma(weight, factor, every_float(_ROUND)), words())
                for half, number in enumerate((code.builder.lshr(whole, every_word(8)), whole)):
                    place = code.plus(line, code.times(column, 2), half * LANES)
                    code.store(code.builder.trunc(number, kind("i8", LANES)), place)
            self._note(code, top, total.value, code.plus(partial, code.times(row, self._partial_bytes), 4 * self._d))
        return code.finish()

    def _int8_sums(self, num_rows: int) -> Any:
        """(row, scratch, values, pages, first, last, partial): weighted sums of a block's values."""
        code = KernelBuilder(self._module, f"sums{num_rows}", 7)
        row, scratch, values, pages, first, last, partial = code.parameters
        rows = [code.plus(row, i) for i in range(num_rows)]
        lines = [self._line(code, scratch, row) for row in rows]
        for start in range(0, self._d, 2 * LANES):  # as many sums as registers hold
            totals = [[[code.variable(every_word(0)) for _ in range(2)] for _ in range(2)] for _ in rows]
            with code.loop(first, last, LANES) as position:
                page = code.plus(values, self._page(code, pages, position))
                if start == 0:
                    code.prefetch(code.plus(page, _AHEAD * page_bytes(self._d)), page_bytes(self._d))
                column = code.times(code.builder.sub(position, first), 2)
                for four in range(0, LANES, 4):
                    parts = [
                        code.load(words(), code.plus(page, four * self._d + (start + half * LANES) * 4))
                        for half in range(2)
                    ]
                    for line, total in zip(lines, totals, strict=True):
                        for half in range(2):
                            weight = code.load(kind("i32"), code.plus(line, column, half * LANES + four))
                            weight = code.splat(weight)
                            for part, places in zip(parts, total, strict=True):
                                places[half].value = code.dot4(places[half].value, weight, part)
            factor = code.splat(code.load(kind("f32"), code.plus(scratch, Int8Scratch(0, self._d).steps)))
            for row, total in zip(rows, totals, strict=True):
                for i, halves in enumerate(total):
                    high, low = (code.builder.sitofp(half.value, floats()) for half in halves)
                    output = code.builder.fmul(code.fma(high, every_float(256.0), low), factor)
                    place = code.plus(partial, code.times(row, self._partial_bytes), (start + i * LANES) * 4)
                    code.store(output, place)
        return code.finish()


def _rounded(code: KernelBuilder, place: Any, d: int) -> tuple[list[Any], Any]:
    """The ``d`` numbers in bfloat16 at ``place`` as integers from −127 to 127, and the factor that undoes it."""
    numbers = [
        code.builder.fpext(code.load(kind("bf16", LANES), code.plus(place, 2 * i)), floats())
        for i in range(0, d, LANES)
    ]
    largest = every_float(_TINY)
    for part in numbers:
        magnitude = code.intrinsic("llvm.fabs.v16f32", floats(), part)
        largest = code.intrinsic("llvm.maxnum.v16f32", floats(), largest, magnitude)
    most = code.intrinsic("llvm.vector.reduce.fmax.v16f32", kind("f32"), largest)
    steps = constant(kind("f32"), _STEPS)
    factor = code.splat(code.builder.fdiv(steps, most))
    integers = []
    for part in numbers:
        whole = code.builder.bitcast(code.fma(part, factor, every_float(_ROUND)), words())
        integers.append(code.builder.sub(whole, every_word(_ROUND_BITS)))
    return integers, code.builder.fdiv(most, steps)


def write_storing(code: KernelBuilder, d: int, new: Any, slot: Any, cache: Any, *, is_key: bool) -> None:
    """Writes the code that stores ``d`` numbers in bfloat16 at ``new`` as slot ``slot`` of a head's pages."""
    t = code.builder.and_(slot, code.integer(LANES - 1))
    page = code.plus(cache, code.times(code.divided(slot, LANES), page_bytes(d)))
    integers, scale = _rounded(code, new, d)
    code.store(scale, code.plus(page, LANES * d, code.times(t, INT8_SCALE_BYTES)))
    four = code.plus(page, code.times(code.divided(t, 4), 4 * d), code.builder.and_(t, code.integer(3)))
    for start, part in zip(range(0, d, LANES), integers, strict=True):
        if is_key:
            stored = code.builder.trunc(code.builder.add(part, every_word(BIAS)), kind("i8", LANES))
            fours = code.builder.bitcast(stored, kind("i32", 4))
            for i in range(4):
                place = code.plus(page, (start + 4 * i) * LANES, code.times(t, 4))
                code.store(code.builder.extract_element(fours, constant(kind("i32"), i)), place)
        else:
            stored = code.builder.trunc(part, kind("i8", LANES))
            for i in range(LANES):
                byte = code.builder.extract_element(stored, constant(kind("i32"), i))
                code.store(byte, code.plus(four, (start + i) * 4))
