"""The product with four-bit weights: rows are rounded to eight bits, so that one instruction multiplies 64 weights.

A weight is code · scale + offset, with a scale and an offset for each output and group of inputs. A group of a row is
q · s with q from -127 to 127 (as in GGUF's Q8_1). So a group adds scale · s · Σ code·q + offset · s · Σ q to an output,
and both sums are of integers. What the rows lose is a tenth of what the weights have lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rapid.kernels.cpu.ir_builder import LANES, KernelBuilder, constant, every_float, every_word, floats, kind, words
from rapid.kernels.cpu.jit import COUNTERS

GROUP = 32  # inputs
PANELS = 2  # in one item of work
MOST = 16  # rows in registers, where this CPU multiplies tiles: to unpack weights costs as much as so many
FLOATS = GROUP // 4 + 2  # of scratch for a group of a row: q, s and s · Σ q
_TILE = 8  # rows
_GROUP_BYTES = GROUP * LANES // 2  # of a panel
_TINY = 1e-30


def write_int4_product(module: Any, names: tuple[str, ...], many: Callable[..., None] | None = None) -> None:
    """The kernel, with the arguments ``names`` (`rapid.kernels.cpu.linear`).

    ``many`` writes the calls for more than `MOST` rows and panels of bfloat16, if this CPU multiplies tiles.
    """
    tiles = [_tile(module, size) for size in range(1, _TILE + 1)]
    code = KernelBuilder(module, "kernel", 1)
    (data,) = code.parameters
    given = {name: code.word(data, COUNTERS + i) for i, name in enumerate(names)}
    scratch = code.plus(given["scratch"], code.times(code.thread(), given["scratch_bytes"]))
    ahead = code.times(code.threads(), given["panel_bytes"], PANELS)  # where the thread's next item is

    @contextmanager
    def items() -> Iterator[tuple[Any, ...]]:
        with code.items(data, given["items"]) as item:
            panel = code.times(item, PANELS)
            weights = code.plus(given["weights"], code.times(panel, given["panel_bytes"]))
            tables = code.times(panel, given["groups"], LANES * 2)
            scales, offsets = (code.plus(given[name], tables) for name in ("scales", "offsets"))
            yield weights, scales, offsets, code.plus(given["output"], code.times(item, PANELS * LANES * 2))

    def in_registers() -> None:
        # Every thread rounds all rows for itself: that is little, and no thread waits for another.
        with code.loop(0, code.times(given["rows"], given["groups"])) as group:  # rows lie behind each other
            x, target = code.times(group, GROUP * 2), code.times(group, FLOATS * 4)
            _round_group(code, code.plus(given["x"], x), code.plus(scratch, target))
        with items() as (*packed, outputs), code.tiles(given["rows"], _TILE) as (row, size):
            own = code.plus(scratch, code.times(row, given["groups"], FLOATS * 4))
            output = code.plus(outputs, code.times(row, given["output_bytes"]))
            code.choose(tiles, size, own, *packed, output, given["groups"], given["output_bytes"], ahead)

    if many is None:
        in_registers()
    else:
        unpack = _unpack(module)
        are_few = code.builder.icmp_signed("<=", given["rows"], code.integer(MOST))
        with code.builder.if_else(are_few) as (then, otherwise):
            with then:
                in_registers()
            with otherwise, items() as (*packed, outputs):
                code.call(unpack, *packed, given["groups"], scratch, ahead)
                panel_bytes = code.times(given["groups"], GROUP * LANES * 2)
                sizes = given["x_bytes"], panel_bytes, given["groups"], given["output_bytes"], 0
                many(code, given["rows"], given["x"], scratch, outputs, *sizes)
    code.finish()


def _unpack(module: Any) -> Any:
    """(weights, scales, offsets, groups, target, ahead): two panels, packed as those of bfloat16 are."""
    code = KernelBuilder(module, "unpack", 6)
    weights, scales, offsets, groups, target, ahead = code.parameters
    with code.loop(0, groups) as group:
        pair_of_panels = code.plus(weights, code.times(group, PANELS * _GROUP_BYTES))
        code.prefetch(code.plus(pair_of_panels, ahead), PANELS * _GROUP_BYTES)
        for panel in range(PANELS):
            column = code.plus(code.times(groups, panel), group)
            scale, offset = (
                code.builder.fpext(
                    code.load(kind("bf16", LANES), code.plus(table, code.times(column, LANES * 2))), floats()
                )
                for table in (scales, offsets)
            )
            for pair in range(GROUP // 8):
                both = code.load(words(), code.plus(pair_of_panels, panel * _GROUP_BYTES + pair * LANES * 4))
                for i in range(4):  # two times four inputs: first those in the lower halves of the four bytes
                    low, high = (
                        _halves(
                            code, code.builder.lshr(both, every_word(8 * (2 * i % 4 + j) + i // 2 * 4)), scale, offset
                        )
                        for j in range(2)
                    )
                    word = code.builder.or_(low, code.builder.shl(high, every_word(16)))
                    place = code.plus(code.times(column, GROUP * LANES * 2), (pair * 4 + i) * LANES * 4)
                    code.store(word, code.plus(target, place))
    return code.finish()


def _halves(code: KernelBuilder, codes: Any, scale: Any, offset: Any) -> Any:
    """The weights of the lowest four bits of each word, in bfloat16 in its lower half."""
    numbers = code.builder.sitofp(code.builder.and_(codes, every_word(0x0F)), floats())
    weights = code.rounded(code.fma(numbers, scale, offset))
    return code.builder.zext(code.builder.bitcast(weights, kind("i16", LANES)), words())


def _round_group(code: KernelBuilder, x: Any, target: Any) -> None:
    """q, s and s · Σ q of 32 numbers."""
    halves = [
        code.builder.fpext(code.load(kind("bf16", LANES), code.plus(x, i * LANES * 2)), floats()) for i in range(2)
    ]
    sizes = [code.intrinsic("llvm.fabs.v16f32", floats(), half) for half in halves]
    largest = code.intrinsic("llvm.maxnum.v16f32", floats(), *sizes)
    for span in (8, 4, 2, 1):
        other = code.shuffle(largest, largest, [i ^ span for i in range(LANES)])
        largest = code.intrinsic("llvm.maxnum.v16f32", floats(), largest, other)
    largest = code.intrinsic("llvm.maxnum.v16f32", floats(), largest, every_float(_TINY))
    factor = code.builder.fdiv(every_float(127.0), largest)
    whole = [code.intrinsic("llvm.rint.v16f32", floats(), code.builder.fmul(half, factor)) for half in halves]
    for i, numbers in enumerate(whole):
        integers = code.builder.trunc(code.builder.fptosi(numbers, words()), kind("i8", LANES))
        code.store(integers, code.plus(target, i * LANES))
    one = constant(kind("i32"), 0)
    scale = code.builder.extract_element(code.builder.fmul(largest, every_float(1 / 127)), one)
    code.store(scale, code.plus(target, GROUP))
    mass = code.builder.fmul(scale, code.sum(code.builder.fadd(*whole)))
    code.store(mass, code.plus(target, GROUP + 4))


def _tile(module: Any, num_rows: int) -> Any:
    """Two panels times ``num_rows`` rounded rows."""
    code = KernelBuilder(module, f"tile{num_rows}", 8)
    x, weights, scales, offsets, output, groups, output_bytes, ahead = code.parameters
    rows, panels = range(num_rows), range(PANELS)
    totals = {(row, panel): code.variable(every_float(0.0)) for row in rows for panel in panels}
    x_bytes = code.times(groups, FLOATS * 4)
    with code.loop(0, groups) as group:
        pair_of_panels = code.plus(weights, code.times(group, PANELS * _GROUP_BYTES))
        code.prefetch(code.plus(pair_of_panels, ahead), PANELS * _GROUP_BYTES)
        places = [code.plus(pair_of_panels, panel * _GROUP_BYTES) for panel in panels]
        own = [code.plus(x, code.times(row, x_bytes), code.times(group, FLOATS * 4)) for row in rows]
        # Each product must wait for the one before it in its sum, so a few rows use several sums.
        sums = {key: [every_word(0)] * max(1, 4 // num_rows) for key in totals}
        for pair in range(GROUP // 8):
            both = [code.load(words(), code.plus(place, pair * LANES * 4)) for place in places]
            for half in range(2):
                codes = [
                    code.builder.and_(code.builder.lshr(each, every_word(4)) if half else each, every_word(0x0F0F0F0F))
                    for each in both
                ]
                four = 2 * pair + half
                for row in rows:
                    numbers = code.splat(code.load(kind("i32"), code.plus(own[row], four * 4)))
                    for panel in panels:
                        parts = sums[row, panel]
                        parts[four % len(parts)] = code.dot4(parts[four % len(parts)], codes[panel], numbers)
        for panel in panels:
            at = code.times(code.plus(code.times(panel, groups), group), LANES * 2)
            scale, offset = (
                code.builder.fpext(code.load(kind("bf16", LANES), code.plus(table, at)), floats())
                for table in (scales, offsets)
            )
            for row in rows:
                total = totals[row, panel]
                whole = sums[row, panel][0]
                for part in sums[row, panel][1:]:
                    whole = code.builder.add(whole, part)
                step, mass = (code.splat(code.load(kind("f32"), code.plus(own[row], GROUP + i))) for i in (0, 4))
                moved = code.fma(offset, mass, total.value)
                numbers = code.builder.sitofp(whole, floats())
                total.value = code.fma(numbers, code.builder.fmul(scale, step), moved)
    for (row, panel), total in totals.items():
        place = code.plus(output, code.times(row, output_bytes), panel * LANES * 2)
        code.store(code.rounded(total.value), place)
    return code.finish()
