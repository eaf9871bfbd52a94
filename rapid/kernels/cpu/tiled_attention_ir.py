"""Writes the LLVM code of the attention over bfloat16 pages for CPUs that multiply tiles (AMX).

It differs from `rapid.kernels.cpu.attention_ir` in its two products: the keys of a page, and the values of two, are
laid out as tiles in memory that stays in the nearest cache, and sixteen rows are multiplied with them at once. So more
rows, as in a verification, cost little more than their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rapid.kernels.cpu import tiles_ir
from rapid.kernels.cpu.attention_ir import AHEAD, BLOCK, Attention, Scratch
from rapid.kernels.cpu.ir_builder import LANES, KernelBuilder, constant, kind, words
from rapid.kernels.cpu.tiles_ir import FIRST_COLUMNS, FIRST_ROWS, INPUTS, ROW_BYTES, TOTALS, Tiles


class TiledScratch(Scratch):
    """The layout of a thread's memory, for whole tiles of rows."""

    def __init__(self, rows: int, d: int) -> None:
        rows = -(-rows // tiles_ir.ROWS) * tiles_ir.ROWS
        self.turned = 0  # keys of a page, and later values of two pages or of the block: tiles of columns
        self.query = BLOCK * d * 2  # [rows, d]
        self.scores = self.query + rows * d * 2
        self.size = self.scores + rows * BLOCK * 4


class TiledAttention(Attention):
    """Writes the kernel. A row's numbers do not depend on the rows beside it."""

    name = "tiles"

    @staticmethod
    def scratch_bytes(rows: int, d: int) -> int:
        return TiledScratch(rows, d).size

    def _item(self) -> Callable[..., None]:
        gather, scores, weights, sums = self._gather(), self._tile_scores(), self._weights(), self._tile_sums()
        offsets = TiledScratch(0, self._d)

        def calls(code: KernelBuilder, given: dict[str, Any], own: dict[str, Any], scratch: Any) -> None:
            rows = code.times(own["new"], self._group)
            query = code.plus(scratch, offsets.query)
            table = code.plus(query, code.times(_rounded_up(code, rows, tiles_ir.ROWS), self._d * 2))
            head = code.times(own["head"], given["head_bytes"])
            pages = code.plus(given["pages"], code.times(own["pages"], 8))
            keys, values = (code.plus(given[name], head) for name in ("keys", "values"))
            partial = code.plus(given["partials"], code.times(own["partial"], self._partial_bytes))
            source = code.plus(given["query"], self._at(code, own["row"], own["head"], given["query_bytes"]))
            code.call(gather, source, given["query_bytes"], rows, query)
            code.call(scores, keys, pages, own["first"], own["last"], scratch, query, rows, table)
            code.call(weights, table, rows, own["first"], own["last"], own["length"], own["new"], partial)
            # The first sixteen rows mix the values of two pages at a time, which stay in the nearest cache. If there
            # are more, those of the whole block are kept for them.
            kept = code.builder.icmp_signed(">", rows, code.integer(tiles_ir.ROWS))
            step = code.builder.select(kept, code.integer(INPUTS * self._d * 2), code.integer(0))
            with code.tiles(rows, tiles_ir.ROWS) as (row, size):
                lines = code.plus(table, code.times(row, BLOCK * 4))
                target = code.plus(partial, code.times(row, self._partial_bytes))
                is_first = code.builder.zext(code.builder.icmp_signed("==", row, code.integer(0)), kind("i64"))
                place = own["first"], own["last"], scratch, step, is_first
                code.call(sums, values, pages, *place, lines, size, target)

        return calls

    def _gather(self) -> Any:
        """(query, its bytes a row, rows, target): the rows of an item behind each other."""
        code = KernelBuilder(self._module, "gather", 4)
        query, row_bytes, rows, target = code.parameters
        with code.loop(0, rows) as row:
            source = code.plus(query, self._row(code, row, row_bytes))
            for start in range(0, self._d * 2, ROW_BYTES):
                part = code.load(words(), code.plus(source, start))
                code.store(part, code.plus(target, code.times(row, self._d * 2), start))
        return code.finish()

    def _tile_scores(self) -> Any:
        """(keys, pages, first, last, turned keys, query, rows, scores): products of a block's keys with all rows."""
        turn = self._turn()
        code = KernelBuilder(self._module, "tile_scores", 8)
        keys, pages, first, last, turned, query, num_rows, scores = code.parameters
        tiles = Tiles(code, code.smaller(tiles_ir.ROWS, num_rows))
        with code.loop(first, last, LANES) as position:
            code.call(turn, code.plus(keys, self._page(code, pages, position)), turned)
            column = code.plus(scores, code.times(code.builder.sub(position, first), 4))
            with code.loop(0, num_rows, tiles_ir.ROWS) as row:  # the last tile may have rows that nobody asked for
                tiles.zero(TOTALS[0])
                for i in range(self._d // INPUTS):
                    rows, columns = FIRST_ROWS + i % 2, FIRST_COLUMNS + i % 2
                    tiles.load(rows, code.plus(query, code.times(row, self._d * 2), i * ROW_BYTES), self._d * 2)
                    tiles.load(columns, code.plus(turned, i * tiles_ir.SIZE))
                    tiles.multiply(TOTALS[0], rows, columns)
                tiles.store(TOTALS[0], code.plus(column, code.times(row, BLOCK * 4)), BLOCK * 4)
        tiles.release()
        return code.finish()

    def _tile_sums(self) -> Any:
        """(values, pages, first, last, mixed, its step, whether to mix, weights, rows, partial): weighted sums.

        ``mixed`` has the tiles of two pages, and those of the next two a step behind them.
        """
        num_tiles = self._d // LANES
        parts = [range(start, min(start + len(TOTALS), num_tiles)) for start in range(0, num_tiles, len(TOTALS))]
        mix_parts = [self._mix(part) for part in parts]
        code = KernelBuilder(self._module, "tile_sums", 10)
        values, pages, first, last, mixed, step, mixes, weights, num_rows, partial = code.parameters
        width = code.builder.sub(last, first)
        pages_width = _rounded_up(code, width, LANES)
        with code.loop(0, num_rows) as row:  # the last tile may end behind the last page
            line = code.plus(weights, code.times(row, BLOCK * 4))
            code.store(constant(kind("i16", LANES), None), code.plus(line, code.times(pages_width, 2)))
        tiles = Tiles(code, num_rows)
        for part, mix in zip(parts, mix_parts, strict=True):
            totals = TOTALS[: len(part)]
            for total in totals:
                tiles.zero(total)
            with code.loop(0, width, INPUTS) as column:
                place = code.plus(mixed, code.times(code.divided(column, INPUTS), step), part.start * tiles_ir.SIZE)
                with code.builder.if_then(code.builder.icmp_signed("!=", mixes, code.integer(0))):
                    for half in range(2):
                        own = code.plus(column, half * LANES)
                        page = code.plus(values, self._page(code, pages, code.plus(first, own)))
                        code.call(mix, page, code.builder.sub(width, own), code.plus(place, half * tiles_ir.SIZE // 2))
                tiles.load(FIRST_ROWS, code.plus(weights, code.times(column, 2)), BLOCK * 4)
                for i, total in enumerate(totals):
                    tiles.load(FIRST_COLUMNS + i % 2, code.plus(place, i * tiles_ir.SIZE))
                    tiles.multiply(total, FIRST_ROWS, FIRST_COLUMNS + i % 2)
            for i, total in zip(part, totals, strict=True):
                tiles.store(total, code.plus(partial, i * ROW_BYTES), self._partial_bytes)
        tiles.release()
        return code.finish()

    def _mix(self, part: range) -> Any:
        """(values of a page, how many of them count, target): the half of a tile for each sixteen outputs of ``part``.

        Behind the last page a page of anything is read, and nothing of it counts.
        """
        code = KernelBuilder(self._module, f"mix{part.start}", 3)
        values, count, target = code.parameters
        half_row = kind("i16", 2 * LANES)
        none = constant(half_row, None)
        counts = [code.builder.icmp_signed("<", code.integer(t), count) for t in range(LANES)]
        for t in range(0, LANES, 2):
            if part.start == 0:
                code.prefetch(code.plus(values, (AHEAD * LANES + t) * self._d * 2), 2 * self._d * 2)
            for tile in range(0, len(part), 2):
                start = (part.start + tile) * LANES
                # Memory behind the last position was never written, and may hold NaN.
                one, other = (
                    code.builder.select(
                        counts[t + i], code.load(half_row, code.plus(values, ((t + i) * self._d + start) * 2)), none
                    )
                    for i in range(2)
                )
                for half in range(2):
                    order = [i + half * LANES + j * 2 * LANES for i in range(LANES) for j in range(2)]
                    place = (tile + half) * tiles_ir.SIZE + t // 2 * ROW_BYTES
                    code.store(code.shuffle(one, other, order), code.plus(target, place))
        return code.finish()


def _rounded_up(code: KernelBuilder, count: Any, step: int) -> Any:
    return code.times(code.divided(code.plus(count, step - 1), step), step)
