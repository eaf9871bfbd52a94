"""The kernels that CPUs without an instruction for bfloat16 get: the same closed forms, and nothing left to link."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_attention
import test_kv_dtype
import test_linear
import test_rows
import torch

from rapid.kernels.cpu import attention_plan as compiled_attention
from rapid.kernels.cpu import ir_builder as kernel_code
from rapid.kernels.cpu import jit
from rapid.kernels.cpu import linear as compiled_linear
from rapid.kernels.cpu import rows as cpu_rows

pytestmark = pytest.mark.skipif(not jit.available(), reason="there are no compiled kernels here")

CACHES = {
    compiled_attention: ("attention_kernel",),
    compiled_linear: ("_kernel",),
    cpu_rows: (
        *("norm_kernel", "gate_kernel", "rotation_kernel", "storing_kernel", "sum_kernel"),
        "int8_storing_kernel",
    ),
}
LIBRARY = {"omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"}  # what `Kernel` looks up


@pytest.fixture(autouse=True, scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the kernels of an older CPU: on x86 one of 2013, with AVX2, and elsewhere this one."""
    folder, compile_plainly = tmp_path_factory.mktemp("kernels"), jit._compile

    def compile_and_look(*arguments: Any) -> bytes:
        code = compile_plainly(*arguments)
        # LLVM rounds, and widens halves, by functions where there is no instruction, and not every system has those.
        assert undefined(code) <= LIBRARY
        return code

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_code, "multiplies_bfloat16", lambda: False)
        patch.setattr(kernel_code, "multiplies_int8", lambda: False)
        for module in (compiled_attention, compiled_linear):
            patch.setattr(module, "multiplies_tiles", lambda: False)
        patch.setattr(jit, "cache_dir", lambda: folder)
        patch.setattr(jit, "_compile", compile_and_look)
        patch.setattr(compiled_linear, "_TILE", 3)  # rows: eight take seven times as long to compile
        for module, names in CACHES.items():
            for name in names:
                patch.setattr(module, name, functools.cache(getattr(module, name).__wrapped__))
        if jit.llvm.get_host_cpu_features().get("avx2"):
            patch.setattr(jit.llvm, "get_host_cpu_name", lambda: "haswell")
            patch.setattr(jit.llvm, "get_host_cpu_features", jit.llvm.FeatureMap)
        yield folder


@pytest.mark.parametrize("num_rows", [1, 5, 8, 50])
def test_products(num_rows: int) -> None:
    for shape in ((48, 96), (33, 17)):
        test_linear.test_dense_weights_are_exact(torch.bfloat16, shape, True, num_rows)
    for scheme in ("int8", "int4"):
        test_linear.test_quantised_weights_are_off_by_half_a_step_at_most(scheme, True, num_rows)
    test_linear.test_int4_keeps_weights_that_were_int4_before(num_rows)


@pytest.mark.parametrize("d", [64, 96])
def test_attention_over_pages(d: int) -> None:
    kernel = test_attention.KERNELS["run"]
    shapes = [(0, 9), (7, 1), (40, 4), (600, 30), (31, 33)]
    test_attention.assert_right(kernel, torch.bfloat16, (2, 3), shapes, d=d)
    test_attention.assert_right(kernel, torch.bfloat16, (2, 3), shapes, d=d, garbage=torch.nan)


def test_attention_over_8_bit_pages() -> None:
    test_kv_dtype.test_int8_pages_hold_numbers_in_255_steps((2, 3), 64)


@pytest.mark.parametrize("rows", [1, 40])
def test_what_happens_to_each_row(rows: int) -> None:
    for check in ("rms_norm", "gated", "rotate", "store"):
        getattr(test_rows, f"test_{check}")(torch.bfloat16, 64, rows)


@pytest.mark.parametrize("near", [1.0, 1e-3, 3e4])
def test_a_number_is_rounded_to_the_nearest_and_halves_to_even(near: float) -> None:
    """As PyTorch does it; the norm of rows of ±1 is what they are multiplied with."""
    steps = torch.arange(-(2**17), 2**17, 2**10, dtype=torch.int32)  # a bfloat16 has 2¹⁶ numbers in float32
    numbers = (torch.tensor(near).view(torch.int32) + steps).view(torch.float32)
    assert len(numbers.bfloat16().unique()) > 4
    rounded = torch.empty(len(numbers), dtype=torch.bfloat16)

    def write(module: Any) -> None:
        code = kernel_code.KernelBuilder(module, "kernel", 1)
        source, target = (code.word(code.parameters[0], jit.COUNTERS + i) for i in range(2))
        for i in range(0, len(numbers), kernel_code.LANES):
            wide = code.load(kernel_code.floats(), code.plus(source, 4 * i))
            code.store(code.rounded(wide), code.plus(target, 2 * i))
        code.finish()

    jit.Kernel("rounding", write, __file__).alone(numbers.data_ptr(), rounded.data_ptr())
    assert torch.equal(rounded, numbers.bfloat16())


def test_every_kernel_is_compiled_for_it(compiled: Path) -> None:
    """And calls nothing that a system might not have (`compile_and_look`)."""
    for bits in (16, 8, 4):
        compiled_linear._kernel(bits)
    compiled_attention.attention_kernel(torch.bfloat16, (2, 3), 64, 64**-0.5)
    compiled_attention.attention_kernel(torch.int8, (2, 3), 64, 64**-0.5)
    for is_key in (True, False):
        cpu_rows.int8_storing_kernel(64, 2, is_key)
    for dtype in (torch.float32, torch.bfloat16):
        cpu_rows.norm_kernel(dtype, 64, 1e-5)
        cpu_rows.gate_kernel(dtype, 64)
        cpu_rows.rotation_kernel(dtype, 64, 3, 5)
        cpu_rows.storing_kernel(dtype, 64, 2)
        cpu_rows.sum_kernel(dtype, 64)
    assert len(list(compiled.rglob("*.o"))) >= 3 + 2 + 2 + 2 * 5


def undefined(code: bytes) -> set[str]:
    """The names that an ELF object file needs from elsewhere."""
    (table,) = struct.unpack_from("<Q", code, 0x28)
    size, count = struct.unpack_from("<HH", code, 0x3A)
    sections = [struct.unpack_from("<IIQQQQI", code, table + i * size) for i in range(count)]
    [(*_, start, length, names)] = [section for section in sections if section[1] == 2]  # the symbols
    entries = (struct.unpack_from("<IBBH", code, at) for at in range(start, start + length, 24))
    needed = (sections[names][4] + name for name, _, _, section in entries if name and not section)
    return {code[at : code.index(0, at)].decode() for at in needed}


@pytest.mark.parametrize("how", ["writable by others", "a link to a file of ours"])
def test_code_that_another_may_have_kept_is_not_run(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, rounded = torch.arange(32.0), torch.empty(16, dtype=torch.bfloat16)

    def kernel(folder: str, first: int) -> tuple[jit.Kernel, Path]:
        """Rounds 16 numbers from the ``first`` on."""

        def write(module: Any) -> None:
            code = kernel_code.KernelBuilder(module, "kernel", 1)
            source, target = (code.word(code.parameters[0], jit.COUNTERS + i) for i in range(2))
            code.store(code.rounded(code.load(kernel_code.floats(), code.plus(source, 4 * first))), target)
            code.finish()

        monkeypatch.setattr(jit, "cache_dir", lambda: tmp_path / folder)
        made = jit.Kernel("copy", write, __file__)
        (kept,) = (tmp_path / folder / "kernels").iterdir()
        return made, kept

    (_, ours), (_, theirs) = kernel("ours", 0), kernel("theirs", 16)
    assert kernel("ours", 16)[1] == ours  # what is kept under this name counts, whatever the caller would write
    ours.unlink()
    if how == "writable by others":
        ours.write_bytes(theirs.read_bytes())
        ours.chmod(0o666)
    else:
        ours.symlink_to(theirs)
    made, kept = kernel("ours", 0)
    made.alone(numbers.data_ptr(), rounded.data_ptr())
    assert torch.equal(rounded, numbers[:16].bfloat16())
    assert not kept.is_symlink() and kept.stat().st_mode & 0o777 == 0o600


def test_kept_kernels_outlive_a_comment_and_no_change_of_what_computes() -> None:
    source = 'def write(x):\n    """Adds one."""\n    return x + 1\n'
    commented = '# A comment.\ndef write(x):\n    """Adds one, as the paper does."""\n\n    return x + 1  # one\n'
    assert jit.code_of(source) == jit.code_of(commented)
    assert jit.code_of(source) != jit.code_of(source.replace("+ 1", "+ 2"))
