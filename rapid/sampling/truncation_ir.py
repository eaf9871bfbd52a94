"""Writes kernels about the k likeliest tokens of a row: top-k, top-p and min-p, from logits to a few probabilities.

Such a kernel reads a row twice: once to find the k largest logits, once to sum the exponentials. All else is about k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rapid.kernels.cpu.ir_builder import LANES, KernelBuilder, constant, every_float, floats, kind
from rapid.kernels.cpu.jit import COUNTERS

MOST = 64  # the largest k; a multiple of the lanes
NUMBERS = "temperature", "top_p", "min_p"  # float64
# A row in float32 and its length, the address of the `NUMBERS`, top_k, k, and where k columns (int64) and the tokens'
# probabilities (float32) go.
ARGUMENTS = "logits", "count", "numbers", "top_k", "k", "columns", "weights"
_LOWEST = -3.0e38  # of a row with fewer than k possible tokens


def write_truncation(module: Any) -> None:
    kernel = Likeliest(module, ARGUMENTS, NUMBERS)
    kernel.select()
    (mass,) = kernel.masses([kernel.temperature()])
    total = kernel.cut(mass)
    with kernel.code.loop(0, kernel.given["k"]) as i:
        weight = kernel.code.builder.fdiv(kernel.double(kernel.at(kind("f32"), kernel.weights, i)), total)
        kernel.put(kernel.code.builder.fptrunc(weight, kind("f32")), kernel.given["weights"], i)
        kernel.put(kernel.at(kind("i64"), kernel.columns, i), kernel.given["columns"], i)
    kernel.code.finish()


class Likeliest:
    """A kernel's parts. Of the k largest, in descending order, it keeps logits (``top``), ``columns`` and ``weights``.

    Of equal logits the one with the larger column comes first, as in `rapid.sampling.truncation`, or with ``takes`` ">"
    that with the smaller one, as in an argmax.
    """

    takes = ">="

    def __init__(self, module: Any, arguments: Sequence[str], numbers: Sequence[str]) -> None:
        self.code = code = KernelBuilder(module, "kernel", 1)
        (data,) = code.parameters
        self.given = {name: code.word(data, COUNTERS + i) for i, name in enumerate(arguments)}
        places = [code.plus(self.given["numbers"], 8 * i) for i in range(len(numbers))]
        self.number = {name: code.load(kind("f64"), place) for name, place in zip(numbers, places, strict=True)}
        self.top, self.weights = (code.room(4 * MOST) for _ in range(2))
        self.columns = code.room(8 * MOST)

    @property
    def row(self) -> Any:
        """The address of the row in float32, as far as `logits` was called."""
        return self.given["logits"]

    def logits(self, i: Any) -> Any:
        """Sixteen numbers of the row, from column ``i`` on."""
        return self.code.load(floats(), self.code.plus(self.row, self.code.times(i, 4)))

    def select(self) -> None:
        """Puts the row's k largest in order."""
        code, builder = self.code, self.code.builder
        code.store(constant(kind("f32", MOST), [_LOWEST] * MOST), self.top)
        code.store(constant(kind("i64", MOST), [0] * MOST), self.columns)
        least = code.variable(constant(kind("f32"), _LOWEST))  # the smallest of the k largest so far
        with code.loop(0, self.given["count"], LANES) as i:
            reaching = builder.fcmp_ordered(self.takes, self.logits(i), code.splat(least.value))
            is_any = builder.icmp_unsigned("!=", builder.bitcast(reaching, kind("i16")), constant(kind("i16"), 0))
            with builder.if_then(is_any), code.loop(0, LANES) as lane:
                column = code.plus(i, lane)
                value = self.at(kind("f32"), self.row, column)
                with builder.if_then(builder.fcmp_ordered(self.takes, value, least.value)):
                    self._insert(value, column)
                    least.value = self.at(kind("f32"), self.top, code.plus(self.given["k"], -1))

    def _insert(self, value: Any, column: Any) -> None:
        """Puts a logit in its place among the k largest; the last one falls out."""
        place = self.code.variable(self.code.plus(self.given["k"], -1))
        with self.code.loop_while(lambda: self._is_behind(place.value, value)):
            before = self.code.plus(place.value, -1)
            self.put(self.at(kind("f32"), self.top, before), self.top, place.value)
            self.put(self.at(kind("i64"), self.columns, before), self.columns, place.value)
            place.value = before
        self.put(value, self.top, place.value)
        self.put(column, self.columns, place.value)

    def _is_behind(self, place: Any, value: Any) -> Any:
        """Whether there is a logit before ``place``, over which this one goes."""
        builder = self.code.builder
        before = self.at(kind("f32"), self.top, self.code.larger(self.code.plus(place, -1), 0))
        is_behind = builder.fcmp_ordered(self.takes, value, before)
        return builder.and_(builder.icmp_signed(">", place, self.code.integer(0)), is_behind)

    def masses(self, temperatures: Sequence[Any]) -> list[Any]:
        """The sums of the row's exponentials at ``temperatures``, relative to the largest."""
        code, builder = self.code, self.code.builder
        highest = code.splat(self.highest())
        sums = [code.variable(every_float(0.0)) for _ in temperatures]
        with code.loop(0, code.times(self.given["count"], 4), 4 * LANES) as i:
            below = builder.fsub(code.load(floats(), code.plus(self.row, i)), highest)
            for total, temperature in zip(sums, temperatures, strict=True):
                total.value = builder.fadd(total.value, code.exp(builder.fdiv(below, temperature)))
        return [code.sum(total.value) for total in sums]

    def cut(self, mass: Any) -> Any:
        """Makes weights of the k largest: top-k, top-p and min-p (`rapid.sampling.truncation`). Returns their sum."""
        code, builder, given, double = self.code, self.code.builder, self.given, kind("f64")
        highest = code.splat(self.highest())
        for i in range(0, 4 * MOST, 4 * LANES):
            below = builder.fsub(code.load(floats(), code.plus(self.top, i)), highest)
            probs = builder.fdiv(code.exp(builder.fdiv(below, self.temperature())), code.splat(mass))
            code.store(probs, code.plus(self.weights, i))
        cuts = builder.icmp_signed(">", given["top_k"], code.integer(0))
        last = code.plus(code.smaller(code.larger(given["top_k"], 1), given["k"]), -1)
        kth = builder.select(cuts, self.at(kind("f32"), self.weights, last), constant(kind("f32"), 0.0))
        zero, one = constant(double, 0.0), constant(double, 1.0)
        inside = code.variable(zero)
        with code.loop(0, given["k"]) as i:
            inside.value = builder.fadd(inside.value, self._at_least(i, kth))
        limit = builder.fmul(self.number["top_p"], builder.select(cuts, inside.value, one))
        is_whole = builder.fcmp_ordered(">=", self.number["top_p"], one)
        least = builder.fmul(self.number["min_p"], self.double(code.load(kind("f32"), self.weights)))
        before, total = code.variable(zero), code.variable(zero)
        with code.loop(0, given["k"]) as i:
            weight = self._at_least(i, kth)
            kept = builder.or_(is_whole, builder.fcmp_ordered("<", before.value, limit))
            kept = builder.and_(kept, builder.fcmp_ordered(">=", weight, least))
            before.value = builder.fadd(before.value, weight)
            weight = builder.select(kept, weight, zero)
            total.value = builder.fadd(total.value, weight)
            self.put(builder.fptrunc(weight, kind("f32")), self.weights, i)
        return total.value

    def _at_least(self, i: Any, kth: Any) -> Any:
        """The i-th weight as float64, or 0 if it is below ``kth``."""
        builder = self.code.builder
        weight = self.at(kind("f32"), self.weights, i)
        kept = builder.select(builder.fcmp_ordered(">=", weight, kth), weight, constant(kind("f32"), 0.0))
        return self.double(kept)

    def highest(self) -> Any:
        return self.code.load(kind("f32"), self.top)

    def temperature(self) -> Any:
        return self.code.splat(self.code.builder.fptrunc(self.number["temperature"], kind("f32")))

    def double(self, number: Any) -> Any:
        return self.code.builder.fpext(number, kind("f64"))

    def at(self, of: Any, array: Any, index: Any) -> Any:
        return self.code.load(of, self.code.plus(array, self.code.times(index, _size(of))))

    def put(self, value: Any, array: Any, index: Any) -> None:
        self.code.store(value, self.code.plus(array, self.code.times(index, _size(value.type))))


def _size(of: Any) -> int:
    sizes = {kind("i8"): 1, kind("f32"): 4, kind("f64"): 8, kind("i64"): 8}
    return sizes[of]
