"""Writes the body of a kernel in LLVM's intermediate representation: loops over sixteen lanes, sums, products."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rapid.kernels.cpu.jit import ir, multiplies_bfloat16, multiplies_int8

LANES = 16


class KernelBuilder:
    """Writes one function's body. Values are LLVM's; addresses and counts are 64-bit integers, strides are in bytes."""

    def __init__(self, module: Any, name: str, num_parameters: int) -> None:
        self.module = module
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), [kind("i64")] * num_parameters), name)
        self.parameters = list(self.function.args)
        self._variables = ir.IRBuilder(self.function.append_basic_block("variables"))
        self.builder = ir.IRBuilder(self.function.append_basic_block("body"))
        self._body = self.builder.block

    def finish(self) -> Any:
        """Ends the function and returns it."""
        self.builder.ret_void()
        self._variables.branch(self._body)
        return self.function

    def integer(self, value: Any) -> Any:
        return constant(kind("i64"), value) if isinstance(value, int) else value

    def plus(self, *terms: Any) -> Any:
        return functools.reduce(self.builder.add, map(self.integer, terms))

    def times(self, *factors: Any) -> Any:
        return functools.reduce(self.builder.mul, map(self.integer, factors))

    def divided(self, value: Any, divisor: Any) -> Any:
        return self.builder.udiv(value, self.integer(divisor))

    def smaller(self, a: Any, b: Any) -> Any:
        a, b = self.integer(a), self.integer(b)
        return self.builder.select(self.builder.icmp_signed("<", a, b), a, b)

    def larger(self, a: Any, b: Any) -> Any:
        a, b = self.integer(a), self.integer(b)
        return self.builder.select(self.builder.icmp_signed(">", a, b), a, b)

    def room(self, num_bytes: int) -> Any:
        """The address of memory that is the function's own."""
        place = self._variables.alloca(ir.ArrayType(kind("i8"), num_bytes))
        return self.builder.ptrtoint(place, kind("i64"))

    def load(self, of: Any, address: Any) -> Any:
        pointer = self.builder.inttoptr(self.integer(address), of.as_pointer())
        return self.builder.load(pointer, align=1)

    def store(self, value: Any, address: Any) -> None:
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=1)

    def word(self, address: Any, index: int = 0) -> Any:
        """The 64-bit integer number ``index`` behind ``address``."""
        return self.load(kind("i64"), self.plus(address, 8 * index))

    def variable(self, value: Any) -> Variable:
        return Variable(self, self._variables.alloca(value.type), value)

    def splat(self, value: Any) -> Any:
        """``value`` in every lane."""
        every = ir.VectorType(value.type, LANES)
        first = self.builder.insert_element(constant(every, ir.Undefined), value, constant(kind("i32"), 0))
        return self.shuffle(first, first, [0] * LANES)

    def shuffle(self, a: Any, b: Any, lanes: Sequence[int]) -> Any:
        return self.builder.shuffle_vector(a, b, constant(kind("i32", len(lanes)), list(lanes)))

    def call(self, function: Any, *arguments: Any) -> Any:
        return self.builder.call(function, [self.integer(argument) for argument in arguments])

    def intrinsic(self, name: str, result: Any, *arguments: Any) -> Any:
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.builder.call(function, arguments)

    def prefetch(self, address: Any, num_bytes: int) -> None:
        """Prefetches memory that is read soon; any address is harmless."""
        kinds = [ir.IntType(8).as_pointer()] + [kind("i32")] * 3
        name = "llvm.prefetch.p0"
        function = self.module.globals.get(name) or ir.Function(
            self.module, ir.FunctionType(ir.VoidType(), kinds), name
        )
        for line in range(0, num_bytes, 64):
            pointer = self.builder.inttoptr(self.plus(address, line), kinds[0])
            # The flags: for reading, into all caches, data.
            self.builder.call(function, [pointer, *(constant(kinds[1], flag) for flag in (0, 2, 1))])

    @contextmanager
    def loop(self, start: Any, stop: Any, step: int = 1) -> Iterator[Any]:
        """``for index in range(start, stop, step)``."""
        index = self.variable(self.integer(start))
        head, body, end = (self.function.append_basic_block(name) for name in ("head", "body", "end"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        self.builder.cbranch(self.builder.icmp_signed("<", index.value, self.integer(stop)), body, end)
        self.builder.position_at_end(body)
        yield index.value
        index.value = self.plus(index.value, step)
        self.builder.branch(head)
        self.builder.position_at_end(end)

    @contextmanager
    def loop_while(self, condition: Callable[[], Any]) -> Iterator[None]:
        """``while condition()``."""
        head, body, end = (self.function.append_basic_block(name) for name in ("while", "do", "done"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        self.builder.cbranch(condition(), body, end)
        self.builder.position_at_end(body)
        yield
        self.builder.branch(head)
        self.builder.position_at_end(end)

    @contextmanager
    def items(self, counter: Any, count: Any) -> Iterator[Any]:
        """Numbers below ``count``, each for one thread only: the first thread that increments the ``counter`` to it."""
        head, body, end = (self.function.append_basic_block(name) for name in ("next", "item", "none"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        pointer = self.builder.inttoptr(counter, kind("i64").as_pointer())
        item = self.builder.atomic_rmw("add", pointer, self.integer(1), "acq_rel")
        self.builder.cbranch(self.builder.icmp_signed("<", item, count), body, end)
        self.builder.position_at_end(body)
        yield item
        self.builder.branch(head)
        self.builder.position_at_end(end)

    @contextmanager
    def tiles(self, count: Any, size: int) -> Iterator[tuple[Any, Any]]:
        """The first of every ``size`` of ``count`` rows, and the number of rows in that tile."""
        with self.loop(0, count, size) as row:
            yield row, self.smaller(size, self.builder.sub(count, row))

    def choose(self, functions: Sequence[Any], number: Any, *arguments: Any) -> None:
        """Calls the first of ``functions`` if ``number`` is 1, and so on."""
        end = self.function.append_basic_block("chosen")
        choice = self.builder.switch(number, end)
        for i, function in enumerate(functions, 1):
            block = self.function.append_basic_block(f"choice{i}")
            choice.add_case(self.integer(i), block)
            self.builder.position_at_end(block)
            self.call(function, *arguments)
            self.builder.branch(end)
        self.builder.position_at_end(end)

    def thread(self) -> Any:
        """The number of the current thread."""
        return self.builder.sext(self.intrinsic("omp_get_thread_num", kind("i32")), kind("i64"))

    def threads(self) -> Any:
        """How many threads run the kernel."""
        return self.builder.sext(self.intrinsic("omp_get_num_threads", kind("i32")), kind("i64"))

    def barrier(self) -> None:
        """Every thread waits here for all threads."""
        self.intrinsic("GOMP_barrier", ir.VoidType())

    def dot2(self, total: Any, a: Any, b: Any) -> Any:
        """``total`` + a₀·b₀ + a₁·b₁ in every lane, of 16 pairs of bfloat16 each."""
        if multiplies_bfloat16():
            pairs = kind("bf16", 2 * LANES)
            a, b = self.builder.bitcast(a, pairs), self.builder.bitcast(b, pairs)
            return self.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", floats(), total, a, b)
        for part in (self.first_of_pairs, self.second_of_pairs):
            total = self.fma(part(a), part(b), total)
        return total

    def dot4(self, total: Any, unsigned: Any, signed: Any) -> Any:
        """``total`` + the sum of four products in every 32-bit lane, of unsigned and signed 8-bit integers."""
        if multiplies_int8():
            fours = kind("i8", 4 * LANES)
            unsigned, signed = self.builder.bitcast(unsigned, fours), self.builder.bitcast(signed, fours)
            return self.intrinsic("llvm.x86.avx512.vpdpbusd.512", words(), total, unsigned, signed)
        for bits in (24, 16, 8, 0):
            a = self.builder.and_(self.builder.lshr(unsigned, every_word(24 - bits)), every_word(0xFF))
            b = self.builder.ashr(self.builder.shl(signed, every_word(bits)), every_word(24))
            total = self.builder.add(total, self.builder.mul(a, b))
        return total

    def rounded(self, numbers: Any) -> Any:
        """``numbers`` in bfloat16; ties to even."""
        if multiplies_bfloat16():
            return self.builder.fptrunc(numbers, kind("bf16", LANES))
        # LLVM would call a function for each lane, and not every system has that function.
        bits = self.builder.bitcast(numbers, words())
        odd = self.builder.and_(self.builder.lshr(bits, every_word(16)), every_word(1))
        bits = self.builder.add(self.builder.add(bits, every_word(0x7FFF)), odd)
        return self.builder.trunc(self.builder.lshr(bits, every_word(16)), kind("i16", LANES))

    def first_of_pairs(self, pairs: Any) -> Any:
        return self.builder.bitcast(self.builder.shl(pairs, every_word(16)), floats())

    def second_of_pairs(self, pairs: Any) -> Any:
        return self.builder.bitcast(self.builder.and_(pairs, every_word(0xFFFF0000)), floats())

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a·b + c."""
        return self.intrinsic("llvm.fma.v16f32", floats(), a, b, c)

    def sum(self, numbers: Any) -> Any:
        """The sum of all lanes."""
        halves = numbers
        for span in (8, 4, 2, 1):
            halves = self.builder.fadd(halves, self.shuffle(halves, halves, [i ^ span for i in range(LANES)]))
        return self.builder.extract_element(halves, constant(kind("i32"), 0))

    def maximum(self, a: Any, b: Any) -> Any:
        """The larger number in every lane, and ``b`` where one of them is NaN: one instruction, as x86 has it."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def exp(self, x: Any) -> Any:
        """exp(x) for x ≤ 0, with a relative error of about 2e-7."""
        return self.exp2(self.builder.fmul(x, every_float(LOG2_E)))

    def exp2(self, power: Any) -> Any:
        """2 to the ``power`` ≤ 0: 2ⁿ·2ᶠ, with a polynomial for the fraction f. Below 2⁻¹²⁶ it is 2⁻¹²⁶."""
        power = self.maximum(power, every_float(-126.0))
        whole = self.intrinsic("llvm.floor.v16f32", floats(), power)
        fraction = self.builder.fsub(power, whole)
        polynomial = every_float(_EXP2[0])
        for coefficient in _EXP2[1:]:
            polynomial = self.fma(polynomial, fraction, every_float(coefficient))
        exponent = self.builder.add(self.builder.fptosi(whole, words()), every_word(127))
        return self.builder.fmul(polynomial, self.builder.bitcast(self.builder.shl(exponent, every_word(23)), floats()))


LOG2_E = 1.4426950408889634
# Coefficients of a least-squares polynomial for 2ᶠ, 0 ≤ f < 1, from f⁵ down to 1.
_EXP2 = (1.8775767e-3, 8.9893397e-3, 5.5826318e-2, 2.4015361e-1, 6.9315308e-1, 9.9999994e-1)


class Variable:
    """A value that changes, such as a sum in a loop. LLVM keeps it in a register."""

    def __init__(self, code: KernelBuilder, place: Any, value: Any) -> None:
        self._code, self._place = code, place
        self.value = value

    @property
    def value(self) -> Any:
        return self._code.builder.load(self._place)

    @value.setter
    def value(self, value: Any) -> None:
        self._code.builder.store(value, self._place)


@functools.cache
def kind(name: str, lanes: int = 1) -> Any:
    """LLVM's type "i64", "i32", "i16", "i8", "f64", "f32" or "bf16", or a vector of them."""

    class BFloat16(ir.Type):  # type: ignore[misc]
        """A type that llvmlite does not have."""

        def _to_string(self) -> str:
            return "bfloat"

    if lanes > 1:
        return ir.VectorType(kind(name), lanes)
    known = {
        "i64": ir.IntType(64),
        "i32": ir.IntType(32),
        "i16": ir.IntType(16),
        "i8": ir.IntType(8),
        "f32": ir.FloatType(),
        "f64": ir.DoubleType(),
    }
    return known[name] if name in known else BFloat16()


def constant(of: Any, value: Any) -> Any:
    """A constant; None is zero in every lane."""
    return ir.Constant(of, value)


def floats() -> Any:
    """Sixteen numbers in float32."""
    return kind("f32", LANES)


def words() -> Any:
    """Sixteen 32-bit integers, or pairs of bfloat16."""
    return kind("i32", LANES)


def every_float(number: float) -> Any:
    """A constant in every lane."""
    return _every(floats(), number)


def every_word(number: int) -> Any:
    """A 32-bit integer in every lane."""
    return _every(words(), number)


def _every(of: Any, number: float) -> Any:
    return constant(of, [number] * LANES)
