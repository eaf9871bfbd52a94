"""Writes the kernel that draws a draft token from a row of logits, from the penalties to the token's q.

PyTorch needs some sixty operators for it. Between two passes over a model's weights none of their code is in the
caches, and each costs a multiple of what it costs alone. The kernel reads the row twice: once to adjust it and to find
the k largest logits, once to sum the exponentials. All else is about these k.
"""

from __future__ import annotations

from typing import Any

from rapid.kernels.cpu.ir_builder import LANES, KernelBuilder, constant, every_float, floats, kind
from rapid.kernels.cpu.jit import COUNTERS
from rapid.sampling.noise import FIRST, GOLDEN, SECOND

MOST = 64  # tokens of a q; a multiple of the lanes
ARGUMENTS = (
    # The row in bfloat16 and its length, and what is known of its columns: a float32 that is added, whether the token
    # is in the text, a float32 that is subtracted, and whether the token was written.
    *("logits", "count", "bias", "in_text", "lowered", "is_written", "ids"),
    # float64: temperature, top_p, min_p, and the penalties of repetition, frequency and presence. Integers: top_k, k,
    # the key of the random numbers, and 1 if the likeliest token is taken.
    *("numbers", "top_k", "k", "key", "likeliest"),
    # Where results go: the token, its column's float64 values (as in `DrawnTokens`); and float32 memory for the row.
    *("token", "values", "scratch"),
)
_LOWEST = -3.0e38  # of a row with fewer than k possible tokens


def write_drawing(module: Any) -> None:
    _Drawing(module).write()


class _Drawing:
    """Writes the kernel's parts. Of the k largest, in descending order, it keeps logits, columns and weights."""

    def __init__(self, module: Any) -> None:
        self._code = KernelBuilder(module, "kernel", 1)
        (data,) = self._code.parameters
        self._given = {name: self._code.word(data, COUNTERS + i) for i, name in enumerate(ARGUMENTS)}
        names = "temperature", "top_p", "min_p", "repetition", "frequency", "presence"
        numbers = self._given["numbers"]
        self._number = {
            name: self._code.load(kind("f64"), self._code.plus(numbers, 8 * i)) for i, name in enumerate(names)
        }
        self._top, self._weights = (self._code.room(4 * MOST) for _ in range(2))
        self._columns = self._code.room(8 * MOST)

    def write(self) -> None:
        code, given = self._code, self._given
        code.store(constant(kind("f32", MOST), [_LOWEST] * MOST), self._top)
        code.store(constant(kind("i64", MOST), [0] * MOST), self._columns)
        self._adjust_and_select()
        mass, mass_at_1 = self._masses()
        total = self._cut(mass)
        best = self._draw(total)
        column = self._at(kind("i64"), self._columns, best)
        token = self._at(kind("i64"), given["ids"], column)
        code.store(token, given["token"])
        code.store(code.builder.sitofp(token, kind("f64")), given["values"])
        below = code.splat(code.builder.fsub(self._at(kind("f32"), self._top, best), self._highest()))
        likelihood = code.builder.extract_element(code.exp(below), constant(kind("i32"), 0))
        share = code.builder.fdiv(self._double(likelihood), self._double(mass_at_1))
        code.store(share, code.plus(given["values"], 8))
        self._write_down(column)
        code.finish()

    def _adjust_and_select(self) -> None:
        """Adjusts the row, and puts its k largest in order."""
        code, builder, given = self._code, self._code.builder, self._given
        repetition = code.splat(builder.fptrunc(self._number["repetition"], kind("f32")))
        least = code.variable(constant(kind("f32"), _LOWEST))  # the smallest of the k largest so far
        with code.loop(0, given["count"], LANES) as i:
            bytes4 = code.times(i, 4)
            x = builder.fpext(code.load(kind("bf16", LANES), code.plus(given["logits"], code.times(i, 2))), floats())
            x = builder.fadd(x, code.load(floats(), code.plus(given["bias"], bytes4)))
            is_positive = builder.fcmp_ordered(">", x, every_float(0.0))
            repeated = builder.select(is_positive, builder.fdiv(x, repetition), builder.fmul(x, repetition))
            in_text = code.load(kind("i8", LANES), code.plus(given["in_text"], i))
            none = constant(kind("i8", LANES), [0] * LANES)
            x = builder.select(builder.icmp_unsigned("!=", in_text, none), repeated, x)
            x = builder.fsub(x, code.load(floats(), code.plus(given["lowered"], bytes4)))
            code.store(x, code.plus(given["scratch"], bytes4))
            larger = builder.fcmp_ordered(">", x, code.splat(least.value))
            mask = builder.bitcast(larger, kind("i16"))
            is_any = builder.icmp_unsigned("!=", mask, constant(kind("i16"), 0))
            with builder.if_then(is_any), code.loop(0, LANES) as lane:
                column = code.plus(i, lane)
                value = self._at(kind("f32"), given["scratch"], column)
                with builder.if_then(builder.fcmp_ordered(">", value, least.value)):
                    self._insert(value, column)
                    least.value = self._at(kind("f32"), self._top, code.plus(given["k"], -1))

    def _insert(self, value: Any, column: Any) -> None:
        """Puts a logit in its place among the k largest; the last one falls out."""
        code = self._code
        place = code.variable(code.plus(self._given["k"], -1))
        with code.loop_while(lambda: self._is_behind(place.value, value)):
            before = code.plus(place.value, -1)
            self._put(self._at(kind("f32"), self._top, before), self._top, place.value)
            self._put(self._at(kind("i64"), self._columns, before), self._columns, place.value)
            place.value = before
        self._put(value, self._top, place.value)
        self._put(column, self._columns, place.value)

    def _is_behind(self, place: Any, value: Any) -> Any:
        """Whether the logit before ``place`` is smaller. There may be none before it: then memory before it is read."""
        builder = self._code.builder
        before = self._code.larger(self._code.plus(place, -1), 0)
        is_smaller = builder.fcmp_ordered("<", self._at(kind("f32"), self._top, before), value)
        return builder.and_(builder.icmp_signed(">", place, self._code.integer(0)), is_smaller)

    def _masses(self) -> tuple[Any, Any]:
        """The sums of the row's exponentials, at the temperature and at 1, relative to the largest."""
        code, builder = self._code, self._code.builder
        highest = code.splat(self._highest())
        sums = [code.variable(every_float(0.0)) for _ in range(2)]
        with code.loop(0, code.times(self._given["count"], 4), 4 * LANES) as i:
            below = builder.fsub(code.load(floats(), code.plus(self._given["scratch"], i)), highest)
            for total, x in zip(sums, (builder.fdiv(below, self._temperature()), below), strict=True):
                total.value = builder.fadd(total.value, code.exp(x))
        mass, mass_at_1 = (code.sum(total.value) for total in sums)
        return mass, mass_at_1

    def _cut(self, mass: Any) -> Any:
        """Makes weights of the k largest: top-k, top-p and min-p (`rapid.sampling.truncation`). Returns their sum."""
        code, builder, given, double = self._code, self._code.builder, self._given, kind("f64")
        highest = code.splat(self._highest())
        for i in range(0, 4 * MOST, 4 * LANES):
            below = builder.fsub(code.load(floats(), code.plus(self._top, i)), highest)
            probs = builder.fdiv(code.exp(builder.fdiv(below, self._temperature())), code.splat(mass))
            code.store(probs, code.plus(self._weights, i))
        cuts = builder.icmp_signed(">", given["top_k"], code.integer(0))
        last = code.plus(code.smaller(code.larger(given["top_k"], 1), given["k"]), -1)
        kth = builder.select(cuts, self._at(kind("f32"), self._weights, last), constant(kind("f32"), 0.0))
        zero, one = constant(double, 0.0), constant(double, 1.0)
        inside = code.variable(zero)
        with code.loop(0, given["k"]) as i:
            inside.value = builder.fadd(inside.value, self._at_least(i, kth))
        limit = builder.fmul(self._number["top_p"], builder.select(cuts, inside.value, one))
        is_whole = builder.fcmp_ordered(">=", self._number["top_p"], one)
        least = builder.fmul(self._number["min_p"], self._double(code.load(kind("f32"), self._weights)))
        before, total = code.variable(zero), code.variable(zero)
        with code.loop(0, given["k"]) as i:
            weight = self._at_least(i, kth)
            kept = builder.or_(is_whole, builder.fcmp_ordered("<", before.value, limit))
            kept = builder.and_(kept, builder.fcmp_ordered(">=", weight, least))
            before.value = builder.fadd(before.value, weight)
            weight = builder.select(kept, weight, zero)
            total.value = builder.fadd(total.value, weight)
            self._put(builder.fptrunc(weight, kind("f32")), self._weights, i)
        return total.value

    def _at_least(self, i: Any, kth: Any) -> Any:
        """The i-th weight as float64, or 0 if it is below ``kth``."""
        builder = self._code.builder
        weight = self._at(kind("f32"), self._weights, i)
        kept = builder.select(builder.fcmp_ordered(">=", weight, kth), weight, constant(kind("f32"), 0.0))
        return self._double(kept)

    def _draw(self, total: Any) -> Any:
        """Writes q, and returns the place of the token whose weight over its exponential number is the largest."""
        code, builder, given, double = self._code, self._code.builder, self._given, kind("f64")
        ids, weights = code.plus(given["values"], 16), code.plus(given["values"], 16, code.times(given["k"], 8))
        best, score = code.variable(code.integer(0)), code.variable(constant(double, -1.0))
        with code.loop(0, given["k"]) as i:
            token = self._at(kind("i64"), given["ids"], self._at(kind("i64"), self._columns, i))
            weight = builder.fdiv(self._double(self._at(kind("f32"), self._weights, i)), total)
            weight = self._double(builder.fptrunc(weight, kind("f32")))
            self._put(builder.sitofp(token, double), ids, i)
            self._put(weight, weights, i)
            own = builder.fdiv(weight, self._exponential(token))
            with builder.if_then(builder.fcmp_ordered(">", own, score.value)):
                score.value, best.value = own, i
        taken = builder.icmp_signed("!=", given["likeliest"], code.integer(0))
        return builder.select(taken, code.integer(0), best.value)

    def _exponential(self, token: Any) -> Any:
        """The token's random number (`rapid.sampling.noise.exponential`)."""
        code, builder = self._code, self._code.builder
        bits = code.plus(code.times(code.plus(token, 1), GOLDEN), self._given["key"])
        for shift, factor in ((30, FIRST), (27, SECOND), (31, None)):
            bits = builder.xor(bits, builder.lshr(bits, code.integer(shift)))
            bits = bits if factor is None else code.times(bits, factor)
        number = builder.uitofp(builder.lshr(bits, code.integer(12)), kind("f64"))
        number = builder.fmul(builder.fadd(number, constant(kind("f64"), 0.5)), constant(kind("f64"), 2.0**-52))
        return builder.fneg(code.intrinsic("llvm.log.f64", kind("f64"), number))

    def _write_down(self, column: Any) -> None:
        """The next row is adjusted by this token, too."""
        builder, given = self._code.builder, self._given
        yes = constant(kind("i8"), 1)
        was_written = builder.icmp_unsigned(
            "!=", self._at(kind("i8"), given["is_written"], column), constant(kind("i8"), 0)
        )
        presence = builder.select(was_written, constant(kind("f64"), 0.0), self._number["presence"])
        more = builder.fptrunc(builder.fadd(self._number["frequency"], presence), kind("f32"))
        self._put(builder.fadd(self._at(kind("f32"), given["lowered"], column), more), given["lowered"], column)
        self._put(yes, given["in_text"], column)
        self._put(yes, given["is_written"], column)

    def _highest(self) -> Any:
        return self._code.load(kind("f32"), self._top)

    def _temperature(self) -> Any:
        return self._code.splat(self._code.builder.fptrunc(self._number["temperature"], kind("f32")))

    def _double(self, number: Any) -> Any:
        return self._code.builder.fpext(number, kind("f64"))

    def _at(self, of: Any, array: Any, index: Any) -> Any:
        return self._code.load(of, self._code.plus(array, self._code.times(index, _size(of))))

    def _put(self, value: Any, array: Any, index: Any) -> None:
        self._code.store(value, self._code.plus(array, self._code.times(index, _size(value.type))))


def _size(of: Any) -> int:
    sizes = {kind("i8"): 1, kind("f32"): 4, kind("f64"): 8, kind("i64"): 8}
    return sizes[of]
