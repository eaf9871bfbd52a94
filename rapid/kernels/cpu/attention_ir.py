"""Writes the LLVM code of the attention over bfloat16 pages (`rapid.kernels.cpu.ir_builder`).

A thread computes a block of positions of one KV head and a few new tokens. The query heads that share the KV head are
rows. Keys are transposed so that one register holds sixteen positions. The thread stores the block's output with its
largest score and its sum of weights. Keys and values are read once, in the order of their addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rapid.kernels.cpu.ir_builder import LANES, LOG2_E, KernelBuilder, constant, every_float, floats, kind, words
from rapid.kernels.cpu.jit import COUNTERS

BLOCK = 256  # positions in one item of work
AHEAD = 2  # pages to prefetch
_LEAST = -1e30  # the largest score of a row that sees no position of a block
# The fields of an item, of a merge and of the arguments. Items and merges lie in tables, one in each line.
_ITEM = ("row", "length", "new", "head", "first", "last", "pages", "partial")
_MERGE = ("row", "new", "head", "partial", "blocks", "apart")
_ARGUMENTS = (
    *("items", "num_items", "merges", "num_merges", "pages", "scratch", "scratch_bytes", "partials"),
    *("query", "query_bytes", "output", "keys", "values", "head_bytes"),
)


class Scratch:
    """The layout of a thread's memory for up to ``rows`` rows; offsets in bytes. Tiles may write past the last row."""

    def __init__(self, rows: int, d: int) -> None:
        self.turned = 0  # keys of a page, [d/2, 16] pairs
        self.scores = self.turned + d // 2 * LANES * 4  # [rows, block]; first float32, then weights in bfloat16
        self.size = self.scores + rows * BLOCK * 4


class Attention:
    """Writes the kernel. Row r of a sequence and KV head is query head r mod group of new token r div group."""

    name = "bfloat16"

    @staticmethod
    def scratch_bytes(rows: int, d: int) -> int:
        """The memory that a thread needs for an item of so many rows."""
        return Scratch(rows, d).size

    def __init__(self, module: Any, num_kv_heads: int, group: int, d: int, scaling: float) -> None:
        self._scaling = scaling
        self._module, self._num_heads, self._group, self._d = module, num_kv_heads * group, group, d
        self._tile = 4 if d <= 64 else 2  # rows whose sums fit into the registers
        self._partial_bytes = 4 * (d + 2)  # of a row: the sums, the largest score, the sum of weights

    def write(self) -> None:
        compute, merge = self._item(), self._merge()
        code = KernelBuilder(self._module, "kernel", 1)
        (data,) = code.parameters
        given = {name: code.word(data, COUNTERS + i) for i, name in enumerate(_ARGUMENTS)}
        scratch = code.plus(given["scratch"], code.times(code.thread(), given["scratch_bytes"]))
        with code.items(data, given["num_items"]) as item:
            compute(code, given, _fields(code, given["items"], item, _ITEM), scratch)
        code.barrier()
        with code.items(code.plus(data, 8), given["num_merges"]) as item:
            own = _fields(code, given["merges"], item, _MERGE)
            partial = code.plus(given["partials"], code.times(own["partial"], self._partial_bytes))
            row_bytes = code.integer(self._num_heads * self._d * 2)
            output = code.plus(given["output"], self._at(code, own["row"], own["head"], row_bytes))
            rows = code.times(own["new"], self._group)
            code.call(merge, partial, own["blocks"], own["apart"], rows, output, row_bytes)
        code.finish()

    def _item(self) -> Callable[..., None]:
        """Writes the functions of an item of work; returns what writes their calls."""
        turn, weights = self._turn(), self._weights()
        sizes = range(1, self._tile + 1)
        scores, sums = [self._scores(size) for size in sizes], [self._sums(size) for size in sizes]
        offsets = Scratch(0, self._d)

        def calls(code: KernelBuilder, given: dict[str, Any], own: dict[str, Any], scratch: Any) -> None:
            turned, table = code.plus(scratch, offsets.turned), code.plus(scratch, offsets.scores)
            rows = code.times(own["new"], self._group)
            head = code.times(own["head"], given["head_bytes"])
            pages = code.plus(given["pages"], code.times(own["pages"], 8))
            row_bytes = given["query_bytes"]
            query = code.plus(given["query"], self._at(code, own["row"], own["head"], row_bytes))
            partial = code.plus(given["partials"], code.times(own["partial"], self._partial_bytes))
            with code.loop(own["first"], own["last"], LANES) as position:
                code.call(turn, code.plus(given["keys"], head, self._page(code, pages, position)), turned)
                column = code.plus(table, code.times(code.builder.sub(position, own["first"]), 4))
                with code.tiles(rows, self._tile) as (row, size):
                    code.choose(scores, size, row, turned, query, row_bytes, column)
            code.call(weights, table, rows, own["first"], own["last"], own["length"], own["new"], partial)
            values = code.plus(given["values"], head)
            with code.tiles(rows, self._tile) as (row, size):
                code.choose(sums, size, row, table, values, pages, own["first"], own["last"], partial)

        return calls

    def _at(self, code: KernelBuilder, row: Any, kv_head: Any, row_bytes: Any) -> Any:
        """The address of the first query head of a KV head, for token ``row``."""
        return code.plus(code.times(row, row_bytes), code.times(kv_head, self._group * self._d * 2))

    def _row(self, code: KernelBuilder, row: Any, row_bytes: Any) -> Any:
        """The offset of row ``row`` from that address."""
        token = code.divided(row, self._group)
        head = code.builder.sub(row, code.times(token, self._group))
        return code.plus(code.times(token, row_bytes), code.times(head, self._d * 2))

    def _page(self, code: KernelBuilder, pages: Any, position: Any) -> Any:
        page = code.word(code.plus(pages, code.times(code.divided(position, LANES), 8)))
        return code.times(page, LANES * self._d * 2)

    def _turn(self) -> Any:
        """(keys of a page, turned): [16, d] to [d/2, 16] pairs."""
        code = KernelBuilder(self._module, "turn", 2)
        keys, turned = code.parameters
        for start in range(0, self._d, 2 * LANES):
            rows = [code.load(words(), code.plus(keys, (t * self._d + start) * 2)) for t in range(LANES)]
            for span in (1, 2, 4, 8):  # swaps the off-diagonal squares of ever larger squares
                rows = [
                    code.shuffle(
                        rows[t & ~span],
                        rows[t | span],
                        [(i & ~span | t & span) + (LANES if i & span else 0) for i in range(LANES)],
                    )
                    for t in range(LANES)
                ]
            for i, row in enumerate(rows):
                code.store(row, code.plus(turned, (start // 2 + i) * LANES * 4))
                code.prefetch(code.plus(keys, AHEAD * LANES * self._d * 2 + (start // 2 + i) * 64), 64)
        return code.finish()

    def _scores(self, num_rows: int) -> Any:
        """(row, turned keys, query, its bytes a row, scores): products of a page's keys with ``num_rows`` rows."""
        code = KernelBuilder(self._module, f"scores{num_rows}", 5)
        row, turned, query, row_bytes, scores = code.parameters
        rows = [code.plus(row, i) for i in range(num_rows)]
        queries = [code.plus(query, self._row(code, row, row_bytes)) for row in rows]
        zero = every_float(0.0)
        totals = [[zero, zero] for _ in rows]  # two sums a row: each product must wait for the one before it in its sum
        for pair in range(self._d // 2):
            key = code.load(words(), code.plus(turned, pair * LANES * 4))
            for total, address in zip(totals, queries, strict=True):
                both = code.splat(code.load(kind("i32"), code.plus(address, pair * 4)))
                total[pair % 2] = code.dot2(total[pair % 2], key, both)
        for row, (even, odd) in zip(rows, totals, strict=True):
            code.store(code.builder.fadd(even, odd), code.plus(scores, code.times(row, BLOCK * 4)))
        return code.finish()

    def _weights(self) -> Any:
        """(scores, rows, first, last, length, new, partial): scores to weights, relative to the block's largest."""
        code = KernelBuilder(self._module, "weights", 7)
        scores, rows, first, last, length, new, partial = code.parameters
        wide = floats()
        width = code.builder.sub(last, first)
        with code.loop(0, rows) as row:
            line = code.plus(scores, code.times(row, BLOCK * 4))
            top = self._largest_score(code, line, row, first, width, length, new)
            total = code.variable(every_float(0.0))
            with code.loop(0, width, LANES) as column:
                # Weights take half the room of scores, so they never overwrite scores that are still needed.
                weight = self._weight(code, code.load(wide, code.plus(line, code.times(column, 4))), top)
                total.value = code.builder.fadd(total.value, weight)
                code.store(code.rounded(weight), code.plus(line, code.times(column, 2)))
            self._note(code, top, total.value, code.plus(partial, code.times(row, self._partial_bytes), 4 * self._d))
        return code.finish()

    def _largest_score(
        self, code: KernelBuilder, line: Any, row: Any, first: Any, width: Any, length: Any, new: Any
    ) -> Any:
        """The largest score of a row before scaling; the scores of positions that it does not see become −inf."""
        lanes = constant(words(), list(range(LANES)))
        # The row sees `seen` positions of the sequence, and the first `limit` columns of this block.
        seen = code.plus(code.builder.sub(length, new), code.divided(row, self._group), 1)
        limit = code.smaller(width, code.builder.sub(seen, first))
        largest = code.variable(every_float(_LEAST))
        full = code.builder.and_(code.larger(limit, 0), code.integer(-LANES))  # of pages that are seen whole
        with code.loop(0, full, LANES) as column:
            largest.value = code.maximum(code.load(floats(), code.plus(line, code.times(column, 4))), largest.value)
        limits = code.splat(code.builder.trunc(limit, kind("i32")))
        with code.loop(full, width, LANES) as column:
            here = code.plus(line, code.times(column, 4))
            columns = code.builder.add(lanes, code.splat(code.builder.trunc(column, kind("i32"))))
            visible = code.builder.icmp_signed("<", columns, limits)
            score = code.builder.select(visible, code.load(floats(), here), every_float(-float("inf")))
            code.store(score, here)
            largest.value = code.maximum(score, largest.value)
        return code.intrinsic("llvm.vector.reduce.fmax.v16f32", kind("f32"), largest.value)

    def _weight(self, code: KernelBuilder, scores: Any, top: Any) -> Any:
        """exp of the ``scores`` less the largest, after scaling."""
        factor = self._scaling * LOG2_E
        less = code.splat(code.builder.fmul(top, constant(kind("f32"), -factor)))
        return code.exp2(code.fma(scores, every_float(factor), less))

    def _note(self, code: KernelBuilder, top: Any, total: Any, place: Any) -> None:
        """Stores a row's largest score and its sum of weights."""
        code.store(code.builder.fmul(top, constant(kind("f32"), self._scaling)), place)
        code.store(code.sum(total), code.plus(place, 4))

    def _sums(self, num_rows: int) -> Any:
        """(row, weights, values, pages, first, last, partial): weighted sums of a block's values."""
        code = KernelBuilder(self._module, f"sums{num_rows}", 7)
        row, weights, values, pages, first, last, partial = code.parameters
        rows = [code.plus(row, i) for i in range(num_rows)]
        lines = [code.plus(weights, code.times(row, BLOCK * 4)) for row in rows]
        totals = [[code.variable(every_float(0.0)) for _ in range(self._d // LANES)] for _ in rows]

        def add(value: Any, column: Any, *, both: bool) -> None:
            """Adds the values of two positions, or of one, with the weights in ``column``."""
            pairs = [code.splat(code.load(kind("i32"), code.plus(line, code.times(column, 2)))) for line in lines]
            for start in range(0, self._d, 2 * LANES):
                row_half = kind("i16", 2 * LANES)
                one = code.load(row_half, code.plus(value, start * 2))
                # Memory behind the last position was never written, and may hold NaN.
                other = (
                    code.load(row_half, code.plus(value, (self._d + start) * 2)) if both else constant(row_half, None)
                )
                for half in range(2):
                    order = [i + half * LANES + j * 2 * LANES for i in range(LANES) for j in range(2)]
                    mixed = code.builder.bitcast(code.shuffle(one, other, order), words())
                    for pair, total in zip(pairs, totals, strict=True):
                        place = total[start // LANES + half]
                        place.value = code.dot2(place.value, mixed, pair)

        with code.loop(first, code.builder.sub(last, code.integer(LANES - 1)), LANES) as position:
            value = code.plus(values, self._page(code, pages, position))
            for t in range(0, LANES, 2):
                code.prefetch(code.plus(value, (AHEAD * LANES + t) * self._d * 2), 2 * self._d * 2)
                column = code.plus(code.builder.sub(position, first), t)
                add(code.plus(value, t * self._d * 2), column, both=True)
        # The rest of the last page.
        rest = code.builder.and_(last, code.integer(LANES - 1))
        start = code.builder.sub(last, rest)
        value = code.plus(values, self._page(code, pages, start))
        with code.loop(0, code.builder.sub(rest, code.integer(1)), 2) as t:
            column = code.plus(code.builder.sub(start, first), t)
            add(code.plus(value, code.times(t, self._d * 2)), column, both=True)
        odd = code.builder.and_(rest, code.integer(1))
        with code.loop(code.builder.sub(rest, odd), rest) as t:
            column = code.plus(code.builder.sub(start, first), t)
            add(code.plus(value, code.times(t, self._d * 2)), column, both=False)
        for row, total in zip(rows, totals, strict=True):
            for i, part in enumerate(total):
                code.store(part.value, code.plus(partial, code.times(row, self._partial_bytes), i * LANES * 4))
        return code.finish()

    def _merge(self) -> Any:
        """(partials, blocks, lines from block to block, rows, output, its bytes a row): merges all blocks' outputs."""
        code = KernelBuilder(self._module, "merge", 6)
        partials, blocks, apart, rows, output, row_bytes = code.parameters
        number = kind("f32")
        stride = code.times(apart, self._partial_bytes)
        with code.loop(0, rows) as row:
            line = code.plus(partials, code.times(row, self._partial_bytes))
            top = code.variable(constant(number, -3e38))
            with code.loop(0, blocks) as block:
                own = code.load(number, code.plus(line, code.times(block, stride), 4 * self._d))
                top.value = code.intrinsic("llvm.maxnum.f32", number, top.value, own)
            totals = [code.variable(every_float(0.0)) for _ in range(self._d // LANES)]
            mass = code.variable(every_float(0.0))
            with code.loop(0, blocks) as block:
                place = code.plus(line, code.times(block, stride))
                own = code.load(number, code.plus(place, 4 * self._d))
                share = code.exp(code.splat(code.builder.fsub(own, top.value)))
                mass.value = code.fma(
                    code.splat(code.load(number, code.plus(place, 4 * self._d + 4))), share, mass.value
                )
                for i, total in enumerate(totals):
                    part = code.load(floats(), code.plus(place, i * LANES * 4))
                    total.value = code.fma(part, share, total.value)
            for i, total in enumerate(totals):
                mean = code.rounded(code.builder.fdiv(total.value, mass.value))
                code.store(mean, code.plus(output, self._row(code, row, row_bytes), i * LANES * 2))
        return code.finish()


def _fields(code: KernelBuilder, table: Any, item: Any, names: tuple[str, ...]) -> dict[str, Any]:
    line = code.plus(table, code.times(item, 8 * len(names)))
    return {name: code.word(line, i) for i, name in enumerate(names)}
