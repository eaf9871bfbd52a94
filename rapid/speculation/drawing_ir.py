"""Writes the kernel that draws a draft token from a row of logits, from the penalties to the token's q.

PyTorch needs some sixty operators for it. Between two passes over a model's weights none of their code is in the
caches, and each costs a multiple of what it costs alone.
"""

from __future__ import annotations

from typing import Any

from rapid.kernels.cpu.ir_builder import LANES, constant, every_float, floats, kind
from rapid.sampling.noise import FIRST, GOLDEN, SECOND
from rapid.sampling.truncation_ir import NUMBERS, Likeliest

ARGUMENTS = (
    # The row in bfloat16 and its length, and what is known of its columns: a float32 that is added, whether the token
    # is in the text, a float32 that is subtracted, and whether the token was written.
    *("logits", "count", "bias", "in_text", "lowered", "is_written", "ids"),
    # The address of the numbers: those of the truncation, and the penalties of repetition, frequency and presence.
    # Then top_k, k, the key of the random numbers, and 1 if the likeliest token is taken.
    *("numbers", "top_k", "k", "key", "likeliest"),
    # Where results go: the token, its column's float64 values (as in `DrawnTokens`); and float32 memory for the row.
    *("token", "values", "scratch"),
)
_PENALTIES = "repetition", "frequency", "presence"


def write_drawing(module: Any) -> None:
    _Drawing(module, ARGUMENTS, (*NUMBERS, *_PENALTIES)).write()


class _Drawing(Likeliest):
    takes = ">"

    def write(self) -> None:
        code, given = self.code, self.given
        self.select()
        mass, mass_at_1 = self.masses([self.temperature(), every_float(1.0)])
        best = self._draw(self.cut(mass))
        column = self.at(kind("i64"), self.columns, best)
        token = self.at(kind("i64"), given["ids"], column)
        code.store(token, given["token"])
        code.store(code.builder.sitofp(token, kind("f64")), given["values"])
        below = code.splat(code.builder.fsub(self.at(kind("f32"), self.top, best), self.highest()))
        likelihood = code.builder.extract_element(code.exp(below), constant(kind("i32"), 0))
        share = code.builder.fdiv(self.double(likelihood), self.double(mass_at_1))
        code.store(share, code.plus(given["values"], 8))
        self._write_down(column)
        code.finish()

    @property
    def row(self) -> Any:
        return self.given["scratch"]

    def logits(self, i: Any) -> Any:
        """The numbers are adjusted, and kept."""
        code, builder, given = self.code, self.code.builder, self.given
        repetition = code.splat(builder.fptrunc(self.number["repetition"], kind("f32")))
        bytes4 = code.times(i, 4)
        x = builder.fpext(code.load(kind("bf16", LANES), code.plus(given["logits"], code.times(i, 2))), floats())
        x = builder.fadd(x, code.load(floats(), code.plus(given["bias"], bytes4)))
        is_positive = builder.fcmp_ordered(">", x, every_float(0.0))
        repeated = builder.select(is_positive, builder.fdiv(x, repetition), builder.fmul(x, repetition))
        in_text = code.load(kind("i8", LANES), code.plus(given["in_text"], i))
        none = constant(kind("i8", LANES), [0] * LANES)
        x = builder.select(builder.icmp_unsigned("!=", in_text, none), repeated, x)
        x = builder.fsub(x, code.load(floats(), code.plus(given["lowered"], bytes4)))
        code.store(x, code.plus(self.row, bytes4))
        return x

    def _draw(self, total: Any) -> Any:
        """Writes q, and returns the place of the token whose weight over its exponential number is the largest."""
        code, builder, given, double = self.code, self.code.builder, self.given, kind("f64")
        ids, weights = code.plus(given["values"], 16), code.plus(given["values"], 16, code.times(given["k"], 8))
        best, score = code.variable(code.integer(0)), code.variable(constant(double, -1.0))
        with code.loop(0, given["k"]) as i:
            token = self.at(kind("i64"), given["ids"], self.at(kind("i64"), self.columns, i))
            weight = builder.fdiv(self.double(self.at(kind("f32"), self.weights, i)), total)
            weight = self.double(builder.fptrunc(weight, kind("f32")))
            self.put(builder.sitofp(token, double), ids, i)
            self.put(weight, weights, i)
            own = builder.fdiv(weight, self._exponential(token))
            with builder.if_then(builder.fcmp_ordered(">", own, score.value)):
                score.value, best.value = own, i
        taken = builder.icmp_signed("!=", given["likeliest"], code.integer(0))
        return builder.select(taken, code.integer(0), best.value)

    def _exponential(self, token: Any) -> Any:
        """The token's random number (`rapid.sampling.noise.exponential`)."""
        code, builder = self.code, self.code.builder
        bits = code.plus(code.times(code.plus(token, 1), GOLDEN), self.given["key"])
        for shift, factor in ((30, FIRST), (27, SECOND), (31, None)):
            bits = builder.xor(bits, builder.lshr(bits, code.integer(shift)))
            bits = bits if factor is None else code.times(bits, factor)
        number = builder.uitofp(builder.lshr(bits, code.integer(12)), kind("f64"))
        number = builder.fmul(builder.fadd(number, constant(kind("f64"), 0.5)), constant(kind("f64"), 2.0**-52))
        return builder.fneg(code.intrinsic("llvm.log.f64", kind("f64"), number))

    def _write_down(self, column: Any) -> None:
        """The next row is adjusted by this token, too."""
        builder, given = self.code.builder, self.given
        yes = constant(kind("i8"), 1)
        written = self.at(kind("i8"), given["is_written"], column)
        was_written = builder.icmp_unsigned("!=", written, constant(kind("i8"), 0))
        presence = builder.select(was_written, constant(kind("f64"), 0.0), self.number["presence"])
        more = builder.fptrunc(builder.fadd(self.number["frequency"], presence), kind("f32"))
        self.put(builder.fadd(self.at(kind("f32"), given["lowered"], column), more), given["lowered"], column)
        self.put(yes, given["in_text"], column)
        self.put(yes, given["is_written"], column)
