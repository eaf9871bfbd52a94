"""Products with few rows at the speed of memory: weights, dense or in few bits, are packed once and read once a step.

Weights are cut into panels of sixteen outputs, one a lane. A panel is contiguous: for each pair of inputs it has the
sixteen outputs' weights. One thread multiplies two panels at a time with a tile of rows in registers. So every weight
is read from memory once for all rows of a step, and those that the thread multiplies next are prefetched meanwhile.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rapid.kernels.cpu import int4_linear_ir, tiles_ir
from rapid.kernels.cpu.int4_linear_ir import FLOATS, GROUP, PANELS, write_int4_product
from rapid.kernels.cpu.ir_builder import LANES, KernelBuilder, every_float, floats, kind, words
from rapid.kernels.cpu.jit import COUNTERS, Kernel, multiplies_tiles
from rapid.kernels.cpu.tiles_ir import FIRST_COLUMNS, FIRST_ROWS, TOTALS, Tiles
from rapid.kernels.quantization import to_int4, to_int8

_TILE = 8  # rows: with two panels, sixteen sums in registers
_FEW = 2  # rows: their sums in registers are no slower than tiles
_ARGUMENTS = (
    *("items", "groups", "weights", "panel_bytes", "scales", "offsets"),
    *("rows", "x", "x_bytes", "output", "output_bytes", "scratch", "scratch_bytes"),
)


class CompiledLinear:
    """The product with ``weight`` [out, in] (+ ``bias`` [out]) as a function of rows [rows, in], in bfloat16.

    With ``bits`` 16 the weights stay as they are. 8 rounds them to a scale per output. 4 rounds them to a scale and an
    offset per output and group of inputs, as in the Q4_1 format of GGUF files; weights from such a file keep their
    values.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        self.bias, self._four = bias, bits == 4
        self._padding = -self.num_inputs % GROUP
        rows = F.pad(weight, (0, self._padding, 0, -self.num_outputs % (PANELS * LANES)))
        self._groups = rows.shape[1] // GROUP
        self._scales = self._offsets = torch.empty(0)
        if bits == 16:
            self._packed = _panels(rows.bfloat16())
        elif bits == 8:
            codes, self._scales = to_int8(rows)
            self._packed = _panels(codes)
        else:
            codes, *pair = to_int4(rows, GROUP)
            fours = codes.view(-1, LANES, rows.shape[1] // 4, 4).transpose(1, 2).flatten(2)
            first, second = fours.unflatten(1, (-1, 2)).unbind(2)
            # Two times four inputs in a byte's place; what an item of work reads lies in one piece.
            items = (first | second << 4).view(-1, PANELS, self._groups, GROUP * LANES // 2)
            self._packed = items.transpose(1, 2).reshape(-1, first.shape[1] * first.shape[2])
            self._scales, self._offsets = (
                part.view(-1, LANES, self._groups).transpose(1, 2).contiguous() for part in pair
            )
        self.kernel = _kernel(bits)
        self._point()

    def _point(self) -> None:
        num_panels = len(self._packed)
        self._width = num_panels * LANES
        self._fixed = (
            *(num_panels // PANELS, self._groups, self._packed.data_ptr(), self._packed[0].nbytes),
            *(self._scales.data_ptr(), self._offsets.data_ptr()),
        )

    @property
    def pads(self) -> bool:
        """Whether input or output rows are longer than the weight's."""
        return self._padding > 0 or self._width != self.num_outputs

    def of_outputs(self, ids: Tensor) -> CompiledLinear:
        """The product with the weight's rows ``ids`` [n] alone: n is a multiple of 32, and not in four bits."""
        some = copy.copy(self)
        some.num_outputs = len(ids)
        some._packed = self._packed.new_empty(len(ids) // LANES, *self._packed.shape[1:])
        some._scales = self._scales.new_empty(len(ids) if len(self._scales) else 0)
        some.bias = None if self.bias is None else self.bias[ids]
        some._point()
        some.copy_outputs(torch.arange(len(ids)), self, ids)
        return some

    def copy_outputs(self, places: Tensor, source: CompiledLinear, ids: Tensor) -> None:
        """Puts the weight's rows ``ids`` [n] of ``source`` in the places of this weight's rows ``places`` [n]."""
        _lanes(self._packed)[places // LANES, places % LANES] = _lanes(source._packed)[ids // LANES, ids % LANES]
        if len(self._scales):
            self._scales[places] = source._scales[ids]
        if self.bias is not None and source.bias is not None:
            self.bias[places] = source.bias[ids]

    def __call__(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, self._padding)) if self._padding else x.contiguous()
        output = torch.empty(len(x), self._width, dtype=torch.bfloat16)
        scratch = self.scratch(len(x))
        self.kernel(*self.arguments(x, output, scratch))
        if self._width != self.num_outputs:
            output = output[:, : self.num_outputs]
        return output if self.bias is None else output + self.bias

    def scratch(self, num_rows: int) -> Tensor:
        """Memory for every thread's rounded rows, or for two panels of unpacked weights."""
        width = self._groups * max(num_rows * FLOATS, PANELS * tiles_ir.SIZE // 4)
        return torch.empty(torch.get_num_threads() if self._four else 0, width)

    def arguments(self, x: Tensor, output: Tensor, scratch: Tensor) -> tuple[int, ...]:
        """The kernel's arguments, for padded rows without the bias; all three tensors must live until it has run."""
        return (
            *(*self._fixed, len(x), x.data_ptr(), x.shape[1] * 2, output.data_ptr(), self._width * 2),
            *(scratch.data_ptr(), scratch.stride(0) * 4),
        )


def _panels(rows: Tensor) -> Tensor:
    """[out, in] to [panels, in/2, 16 · 2]."""
    return rows.view(-1, LANES, rows.shape[1] // 2, 2).transpose(1, 2).flatten(2).contiguous()


def _lanes(packed: Tensor) -> Tensor:
    """A view of dense or 8-bit panels, [panels, 16, in/2], whose elements are pairs of inputs."""
    pairs = packed.view(torch.int32 if packed.dtype == torch.bfloat16 else torch.int16)
    return pairs.view(len(packed), -1, LANES).transpose(1, 2)


@functools.cache
def _kernel(bits: int) -> Kernel:
    if bits == 4:
        tiled, write = multiplies_tiles(), functools.partial(write_int4_product, names=_ARGUMENTS)
        return Kernel(
            "product-4-tiles" if tiled else "product-4",
            lambda module: write(module, many=_TiledProduct(module, 16).many() if tiled else None),
            *(__file__, int4_linear_ir.__file__, tiles_ir.__file__),
        )
    if bits == 16 and multiplies_tiles():
        return Kernel("product-tiles", lambda module: _TiledProduct(module, bits).write(), __file__, tiles_ir.__file__)
    return Kernel(f"product-{bits}", lambda module: _Product(module, bits).write(), __file__)


class _Product:
    """Writes the kernel for weights of 16 or 8 ``bits``."""

    def __init__(self, module: Any, bits: int) -> None:
        self._module, self._bits = module, bits
        self._group_bytes = GROUP * LANES * bits // 8  # of a panel

    def write(self) -> None:
        multiply = self._rows(_TILE)
        code = KernelBuilder(self._module, "kernel", 1)
        (data,) = code.parameters
        given = {name: code.word(data, COUNTERS + i) for i, name in enumerate(_ARGUMENTS)}
        ahead = code.times(code.threads(), given["panel_bytes"], PANELS)  # where the thread's next item is
        with code.items(data, given["items"]) as item:
            panel = code.times(item, PANELS)
            weights = code.plus(given["weights"], code.times(panel, given["panel_bytes"]))
            scales = code.plus(given["scales"], code.times(panel, LANES * 4))
            outputs = code.plus(given["output"], code.times(item, PANELS * LANES * 2))
            sizes = given["x_bytes"], given["panel_bytes"], given["groups"], given["output_bytes"], ahead
            multiply(code, given["rows"], given["x"], weights, scales, outputs, *sizes)
        code.finish()

    def _rows(self, most: int) -> Callable[..., None]:
        """Writes the functions for up to ``most`` rows; returns what writes their calls, for any number of rows."""
        tiles = [self._tile(size) for size in range(1, most + 1)]

        def calls(code: KernelBuilder, rows: Any, x: Any, weights: Any, scales: Any, output: Any, *sizes: Any) -> None:
            x_bytes, _, _, output_bytes, _ = sizes
            with code.tiles(rows, most) as (row, size):
                own = code.plus(x, code.times(row, x_bytes)), weights, scales
                code.choose(tiles, size, *own, code.plus(output, code.times(row, output_bytes)), *sizes)

        return calls

    def _tile(self, num_rows: int) -> Any:
        """Two panels times ``num_rows`` rows."""
        code = KernelBuilder(self._module, f"tile{num_rows}", 9)
        x, weights, scales, output, x_bytes, panel_bytes, groups, output_bytes, ahead = code.parameters
        rows, panels = range(num_rows), range(PANELS)
        zero = every_float(0.0)
        totals = {(row, panel): code.variable(zero) for row in rows for panel in panels}
        with code.loop(0, groups) as group:
            places = [
                code.plus(weights, code.times(panel, panel_bytes), code.times(group, self._group_bytes))
                for panel in panels
            ]
            for place in places:
                code.prefetch(code.plus(place, ahead), self._group_bytes)
            inputs = [code.plus(x, code.times(row, x_bytes), code.times(group, GROUP * 2)) for row in rows]
            # Each product must wait for the one before it in its sum, so a few rows use several sums.
            parts = {key: [total.value] + [zero] * (max(1, 4 // num_rows) - 1) for key, total in totals.items()}
            for pair in range(GROUP // 2):
                pairs = [self._pair(code, place, pair) for place in places]
                for row in rows:
                    both = code.splat(code.load(kind("i32"), code.plus(inputs[row], pair * 4)))
                    for panel in panels:
                        own = parts[row, panel]
                        own[pair % len(own)] = code.dot2(own[pair % len(own)], pairs[panel], both)
            for key, own in parts.items():
                totals[key].value = functools.reduce(code.builder.fadd, own)
        for (row, panel), total in totals.items():
            result = total.value
            if self._bits == 8:
                result = code.builder.fmul(result, code.load(floats(), code.plus(scales, panel * LANES * 4)))
            place = code.plus(output, code.times(row, output_bytes), panel * LANES * 2)
            code.store(code.rounded(result), place)
        return code.finish()

    def _pair(self, code: KernelBuilder, group: Any, pair: int) -> Any:
        """The weights of one of a group's pairs of inputs, as 16 pairs of bfloat16."""
        if self._bits == 16:
            return code.load(words(), code.plus(group, pair * LANES * 4))
        codes = code.load(kind("i8", 2 * LANES), code.plus(group, pair * LANES * 2))
        numbers = code.builder.sitofp(codes, kind("f32", 2 * LANES))
        # The numbers are exact in the upper half of a float32.
        upper = code.builder.bitcast(numbers, kind("i16", 4 * LANES))
        return code.builder.bitcast(code.shuffle(upper, upper, range(1, 4 * LANES, 2)), words())


class _TiledProduct(_Product):
    """Writes the kernel for weights of 16 bits and CPUs that multiply tiles: a panel's group of inputs is one tile."""

    def _rows(self, most: int) -> Callable[..., None]:
        few, many = super()._rows(_FEW), self.many()

        def calls(code: KernelBuilder, rows: Any, x: Any, weights: Any, scales: Any, output: Any, *sizes: Any) -> None:
            is_few = code.builder.icmp_signed("<=", rows, code.integer(_FEW))
            with code.builder.if_else(is_few) as (then, otherwise):
                with then:
                    few(code, rows, x, weights, scales, output, *sizes)
                with otherwise:
                    many(code, rows, x, weights, output, *sizes)

        return calls

    def many(self) -> Callable[..., None]:
        """Writes the functions for rows in tiles; returns what writes their calls."""
        one, two = (self._tiles(count) for count in (1, 2))
        pair = 2 * tiles_ir.ROWS

        def calls(code: KernelBuilder, rows: Any, x: Any, weights: Any, output: Any, *sizes: Any) -> None:
            x_bytes, _, _, output_bytes, _ = sizes

            def call(function: Any, row: Any, size: Any) -> None:
                source, target = (
                    code.plus(x, code.times(row, x_bytes)),
                    code.plus(output, code.times(row, output_bytes)),
                )
                code.call(function, size, source, weights, target, *sizes)

            end = code.times(code.divided(rows, pair), pair)
            with code.loop(0, end, pair) as row:
                call(two, row, tiles_ir.ROWS)
            with code.loop(end, rows, tiles_ir.ROWS) as row:
                call(one, row, code.smaller(tiles_ir.ROWS, code.builder.sub(rows, row)))

        return calls

    def _tiles(self, count: int) -> Any:
        """Two panels times ``count`` tiles of rows: so two tiles that are loaded serve four products."""
        code = KernelBuilder(self._module, f"tiles{count}", 9)
        num_rows, x, weights, output, x_bytes, panel_bytes, groups, output_bytes, ahead = code.parameters
        tiles = Tiles(code, num_rows)
        products = [(row, panel) for row in range(count) for panel in range(PANELS)]
        for total in TOTALS[: len(products)]:
            tiles.zero(total)
        with code.loop(0, groups) as group:
            for row in range(count):
                rows = code.plus(x, code.times(x_bytes, row * tiles_ir.ROWS), code.times(group, GROUP * 2))
                tiles.load(FIRST_ROWS + row, rows, x_bytes)
            for panel in range(PANELS):
                place = code.plus(weights, code.times(panel, panel_bytes), code.times(group, self._group_bytes))
                code.prefetch(code.plus(place, ahead), self._group_bytes)
                tiles.load(FIRST_COLUMNS + panel, place)
            for total, (row, panel) in zip(TOTALS, products, strict=False):
                tiles.multiply(total, FIRST_ROWS + row, FIRST_COLUMNS + panel)
        sums = code.room(tiles_ir.SIZE)
        for total, (row, panel) in zip(TOTALS, products, strict=False):
            tiles.store(total, sums)
            target = code.plus(output, code.times(output_bytes, row * tiles_ir.ROWS), panel * LANES * 2)
            with code.loop(0, num_rows) as line:
                numbers = code.load(floats(), code.plus(sums, code.times(line, tiles_ir.ROW_BYTES)))
                code.store(code.rounded(numbers), code.plus(target, code.times(line, output_bytes)))
        tiles.release()
        return code.finish()
