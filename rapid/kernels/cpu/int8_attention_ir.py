"""Writes the LLVM code of the attention over 8-bit pages, and of storing keys and values in them.

A stored key or value is d integers and one scale, its largest magnitude over 127. The integers of a page lie as the
instruction for groups of four products (VNNI) reads them, so nothing is turned or widened when they are read:

* keys: [d/4, 16 positions, 4] unsigned, 128 more than the number; then 16 scales in float32
* values: [4, d, 4 positions] signed; then 16 scales

Both operands of that instruction have 8 bits, so a query, and a weight times its value's scale, is rounded to 16 bits
and multiplied in two halves. The products of integers are exact. What is lost is in the stored numbers.
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

_AHEAD = 2  # pages to prefetch
_BIAS = 128  # of stored keys
_QUERY_STEPS = 127.0 * 256  # both halves of a query then have 8 bits with a sign
_WEIGHT_STEPS = 65535.0
_TINY = 1e-30  # instead of a scale of 0


def page_bytes(d: int) -> int:
    """Bytes of the keys, or of the values, of a page in one KV head."""
    return LANES * (d + INT8_SCALE_BYTES)


class Int8Scratch:
    """The layout of a thread's memory: a line for each of ``rows`` rows; offsets in a line, in bytes."""

    def __init__(self, rows: int, d: int) -> None:
        self.query = BLOCK * 4  # behind the scores, then weights: high halves [d], low halves [d]
        self.query_factor = self.query + 2 * d  # float32
        self.bias = self.query_factor + 4  # int32 for each half: what the keys' bias adds to a product, negated
        self.weight_factor = self.bias + 8  # float32
        self.line = self.query + 2 * d + 64
        self.size = rows * self.line


class Int8Attention(Attention):
    """Writes the kernel. It differs from that over bfloat16 pages in an item of work, and merges items as that does."""

    def _item(self) -> Callable[..., None]:
        split, weights = self._split_query(), self._int8_weights()
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
            code.call(split, rows, query, row_bytes, scratch)
            with code.loop(own["first"], own["last"], LANES) as position:
                page = code.plus(keys, self._page(code, pages, position))
                code.prefetch(code.plus(page, _AHEAD * page_bytes(self._d)), page_bytes(self._d))
                column = code.times(code.builder.sub(position, own["first"]), 4)
                with code.tiles(rows, 4) as (row, size):
                    code.choose(scores, size, row, page, scratch, column)
            seen = (own["first"], own["last"], own["length"], own["new"])
            code.call(weights, scratch, rows, *seen, values, pages, partial)
            with code.tiles(rows, 4) as (row, size):
                code.choose(sums, size, row, scratch, values, pages, own["first"], own["last"], partial)

        return calls

    def _page(self, code: KernelBuilder, pages: Any, position: Any) -> Any:
        page = code.word(code.plus(pages, code.times(code.divided(position, LANES), 8)))
        return code.times(page, page_bytes(self._d))

    def _line(self, code: KernelBuilder, scratch: Any, row: Any) -> Any:
        return code.plus(scratch, code.times(row, Int8Scratch(0, self._d).line))

    def _split_query(self) -> Any:
        """(rows, query, its bytes a row, scratch): every row of the query in two halves of 8 bits."""
        code = KernelBuilder(self._module, "split", 4)
        rows, query, row_bytes, scratch = code.parameters
        offsets = Int8Scratch(0, self._d)
        with code.loop(0, rows) as row:
            line = self._line(code, scratch, row)
            source = code.plus(query, self._row(code, row, row_bytes))
            numbers = [
                code.builder.fpext(code.load(kind("bf16", LANES), code.plus(source, 2 * i)), floats())
                for i in range(0, self._d, LANES)
            ]
            largest = largest_magnitude(code, numbers)
            factor = code.splat(code.builder.fdiv(constant(kind("f32"), _QUERY_STEPS), largest))
            sums = [every_word(0), every_word(0)]
            for i, part in enumerate(numbers):
                whole = nearest(code, code.builder.fmul(part, factor))
                high = code.builder.ashr(code.builder.add(whole, every_word(128)), every_word(8))
                low = code.builder.sub(whole, code.builder.shl(high, every_word(8)))
                for half, number in enumerate((high, low)):
                    place = code.plus(line, offsets.query + half * self._d + i * LANES)
                    code.store(code.builder.trunc(number, kind("i8", LANES)), place)
                    sums[half] = code.builder.add(sums[half], number)
            back = code.builder.fdiv(largest, constant(kind("f32"), _QUERY_STEPS))
            code.store(back, code.plus(line, offsets.query_factor))
            for half, total in enumerate(sums):
                bias = code.intrinsic("llvm.vector.reduce.add.v16i32", kind("i32"), total)
                bias = code.builder.mul(bias, constant(kind("i32"), -_BIAS))
                code.store(bias, code.plus(line, offsets.bias + 4 * half))
        return code.finish()

    def _int8_scores(self, num_rows: int) -> Any:
        """(row, page of keys, scratch, column's offset): products of a page's keys with ``num_rows`` rows."""
        code = KernelBuilder(self._module, f"scores{num_rows}", 4)
        row, page, scratch, column = code.parameters
        offsets = Int8Scratch(0, self._d)
        lines = [self._line(code, scratch, code.plus(row, i)) for i in range(num_rows)]
        totals = [
            [code.splat(code.load(kind("i32"), code.plus(line, offsets.bias + 4 * half))) for half in range(2)]
            for line in lines
        ]
        for i in range(0, self._d, 4):
            key = code.load(words(), code.plus(page, i * LANES))
            for line, total in zip(lines, totals, strict=True):
                for half in range(2):
                    place = code.plus(line, offsets.query + half * self._d + i)
                    total[half] = code.dot4(total[half], key, code.splat(code.load(kind("i32"), place)))
        scales = code.load(floats(), code.plus(page, LANES * self._d))
        for line, total in zip(lines, totals, strict=True):
            factor = code.splat(code.load(kind("f32"), code.plus(line, offsets.query_factor)))
            score = code.builder.fmul(code.builder.fmul(joined(code, *total), scales), factor)
            code.store(score, code.plus(line, column))
        return code.finish()

    def _int8_weights(self) -> Any:
        """(scratch, rows, first, last, length, new, values, pages, partial): scores to weights times values' scales.

        Each sixteen weights become sixteen high and sixteen low halves.
        """
        code = KernelBuilder(self._module, "weights", 9)
        scratch, rows, first, last, length, new, values, pages, partial = code.parameters
        offsets, wide = Int8Scratch(0, self._d), floats()
        width = code.builder.sub(last, first)
        with code.loop(0, rows) as row:
            line = self._line(code, scratch, row)
            top = self._mask_scores(code, line, row, first, width, length, new)
            total, largest = code.variable(every_float(0.0)), code.variable(every_float(0.0))
            with code.loop(0, width, LANES) as column:
                here = code.plus(line, code.times(column, 4))
                weight = code.exp(code.builder.fsub(code.load(wide, here), code.splat(top)))
                total.value = code.builder.fadd(total.value, weight)
                page = code.plus(values, self._page(code, pages, code.plus(first, column)))
                # Scales behind the last position were never written, and may be NaN.
                score = code.load(wide, here)
                visible = code.builder.fcmp_ordered("!=", score, every_float(-float("inf")))
                weight = code.builder.fmul(weight, code.load(wide, code.plus(page, LANES * self._d)))
                weight = code.builder.select(visible, weight, every_float(0.0))
                largest.value = code.intrinsic("llvm.maxnum.v16f32", wide, largest.value, weight)
                code.store(weight, here)
            most = code.intrinsic("llvm.vector.reduce.fmax.v16f32", kind("f32"), largest.value)
            most = code.intrinsic("llvm.maxnum.f32", kind("f32"), most, constant(kind("f32"), _TINY))
            steps = constant(kind("f32"), _WEIGHT_STEPS)
            factor = code.splat(code.builder.fdiv(steps, most))
            with code.loop(0, width, LANES) as column:
                # Halves take half the room of weights, so they never overwrite weights that are still needed.
                weight = code.load(wide, code.plus(line, code.times(column, 4)))
                whole = nearest(code, code.builder.fmul(weight, factor))
                for half, number in enumerate((code.builder.lshr(whole, every_word(8)), whole)):
                    place = code.plus(line, code.times(column, 2), half * LANES)
                    code.store(code.builder.trunc(number, kind("i8", LANES)), place)
            code.store(code.builder.fdiv(most, steps), code.plus(line, offsets.weight_factor))
            result = code.plus(partial, code.times(row, self._partial_bytes), 4 * self._d)
            code.store(top, result)
            code.store(code.sum(total.value), code.plus(result, 4))
        return code.finish()

    def _int8_sums(self, num_rows: int) -> Any:
        """(row, scratch, values, pages, first, last, partial): weighted sums of a block's values."""
        code = KernelBuilder(self._module, f"sums{num_rows}", 7)
        row, scratch, values, pages, first, last, partial = code.parameters
        offsets = Int8Scratch(0, self._d)
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
            for row, line, total in zip(rows, lines, totals, strict=True):
                factor = code.splat(code.load(kind("f32"), code.plus(line, offsets.weight_factor)))
                for i, (high, low) in enumerate(total):
                    output = code.builder.fmul(joined(code, high.value, low.value), factor)
                    place = code.plus(partial, code.times(row, self._partial_bytes), (start + i * LANES) * 4)
                    code.store(output, place)
        return code.finish()


def joined(code: KernelBuilder, high: Any, low: Any) -> Any:
    """256 · high + low in float32."""
    return code.fma(code.builder.sitofp(high, floats()), every_float(256.0), code.builder.sitofp(low, floats()))


def nearest(code: KernelBuilder, numbers: Any) -> Any:
    """The nearest 32-bit integers; halves go up."""
    up = code.intrinsic("llvm.floor.v16f32", floats(), code.builder.fadd(numbers, every_float(0.5)))
    return code.builder.fptosi(up, words())


def largest_magnitude(code: KernelBuilder, numbers: list[Any]) -> Any:
    """The largest magnitude in all lanes of ``numbers``, and never 0."""
    largest = every_float(_TINY)
    for part in numbers:
        magnitude = code.intrinsic("llvm.fabs.v16f32", floats(), part)
        largest = code.intrinsic("llvm.maxnum.v16f32", floats(), largest, magnitude)
    return code.intrinsic("llvm.vector.reduce.fmax.v16f32", kind("f32"), largest)


def write_storing(code: KernelBuilder, d: int, new: Any, slot: Any, cache: Any, *, is_key: bool) -> None:
    """Writes the code that stores ``d`` numbers in bfloat16 at ``new`` as slot ``slot`` of a head's pages."""
    t = code.builder.and_(slot, code.integer(LANES - 1))
    page = code.plus(cache, code.times(code.divided(slot, LANES), page_bytes(d)))
    numbers = [
        code.builder.fpext(code.load(kind("bf16", LANES), code.plus(new, 2 * i)), floats()) for i in range(0, d, LANES)
    ]
    scale = code.builder.fdiv(largest_magnitude(code, numbers), constant(kind("f32"), 127.0))
    code.store(scale, code.plus(page, LANES * d, code.times(t, INT8_SCALE_BYTES)))
    factor = code.splat(code.builder.fdiv(constant(kind("f32"), 1.0), scale))
    four = code.plus(page, code.times(code.divided(t, 4), 4 * d), code.builder.and_(t, code.integer(3)))
    for start, part in zip(range(0, d, LANES), numbers, strict=True):
        whole = nearest(code, code.builder.fmul(part, factor))
        if is_key:
            whole = code.builder.add(whole, every_word(_BIAS))
        stored = code.builder.trunc(whole, kind("i8", LANES))
        if is_key:
            fours = code.builder.bitcast(stored, kind("i32", 4))
            for i in range(4):
                place = code.plus(page, (start + 4 * i) * LANES, code.times(t, 4))
                code.store(code.builder.extract_element(fours, constant(kind("i32"), i)), place)
        else:
            for i in range(LANES):
                byte = code.builder.extract_element(stored, constant(kind("i32"), i))
                code.store(byte, code.plus(four, (start + i) * 4))
