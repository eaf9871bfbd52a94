"""Compiles kernels for few rows for this machine's CPU while a model loads, with LLVM and without a compiler.

PyTorch has no attention over pages, and no product with packed bfloat16 weights that reads memory at full speed when
there are only a few rows. Here a kernel is Python that writes LLVM's intermediate representation
(`rapid.kernels.cpu.ir_builder`). llvmlite compiles it. All threads of PyTorch's own OpenMP team run it, so that no
second set of threads competes with them. Without llvmlite or that team, `available` returns False and PyTorch's
operators do the work.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import functools
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rapid.kernels import compiling
from rapid.weights.embedded_models import cache_dir

try:
    import llvmlite.binding as llvm
    from llvmlite import ir as ir  # for `rapid.kernels.cpu.ir_builder`
except ImportError:
    llvm = ir = None

_ARCH_PRCTL, _REQUEST_STATE, _TILES = 158, 0x1023, 18  # the numbers of Linux on x86-64
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
COUNTERS = 2  # the first arguments of every kernel; threads increment them to get the next item of work


@functools.cache
def available() -> bool:
    """Whether this machine can compile kernels, and PyTorch's threads can run them."""
    return ir is not None and _openmp() is not None


@functools.cache
def _openmp() -> str | None:
    """The path of the GNU OpenMP library that PyTorch has loaded."""
    maps = Path("/proc/self/maps")
    paths = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    packages = Path(torch.__file__).parents[1]
    own = (f"{packages}/torch/", f"{packages}/torch.libs/")  # other packages have an OpenMP library of their own
    found = sorted(path for path in paths if "libgomp" in path and path.startswith(own))
    return found[0] if found else None


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has an instruction for pairs of bfloat16."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("avx512bf16") and features.get("avx512bw"))


@functools.cache
def multiplies_int8() -> bool:
    """Whether this CPU has an instruction for groups of four 8-bit integers (VNNI)."""
    return bool(llvm.get_host_cpu_features().get("avx512vnni"))


@functools.cache
def multiplies_tiles() -> bool:
    """Whether this CPU multiplies tiles of bfloat16 (AMX), and the system lets this process have some."""
    features = llvm.get_host_cpu_features()
    if not (multiplies_bfloat16() and features.get("amx-tile") and features.get("amx-bf16")):
        return False
    # Linux keeps 8 KB more for each thread that has tiles, so a process has to ask for them (arch_prctl).
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_STATE, _TILES) == 0)


class Kernel:
    """A compiled function of a pointer to its arguments.

    The arguments are 64-bit integers, of which the first are counters that start at 0. The compiled code for this CPU
    is cached beside the models, so a later start does not compile it again.
    """

    def __init__(self, name: str, write: Callable[[Any], None], *sources: str) -> None:
        """``write``, defined in the files ``sources``, puts a function "kernel" of one parameter into a module.

        ``name`` identifies the kernel.
        """
        openmp = _openmp()
        assert openmp is not None
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        library = ctypes.CDLL(openmp)
        for symbol in (
            "omp_get_thread_num",
            "omp_get_num_threads",
            "GOMP_barrier",
            "GOMP_parallel",
        ):  # of this library, if the process has loaded two
            llvm.add_symbol(symbol, ctypes.cast(library[symbol], ctypes.c_void_p).value)
        features = llvm.get_host_cpu_features().flatten()
        if "+avx512fp16" in features:  # LLVM would move 16-bit integers one by one through the registers of halves
            features += ",-avx512fp16"
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True
        )
        kept = cache_dir() / "kernels" / f"{name}-{_version(sources)}.o"
        code = _kept(kept) or _keep(_compile(machine, write), kept)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        self.address = self._engine.get_function_address("kernel")
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)
        self._parallel = library.GOMP_parallel
        self._parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]

    def __call__(self, *arguments: int) -> None:
        """Runs the kernel on all threads."""
        threads = torch.get_num_threads()
        if threads == 1:
            self.alone(*arguments)
        else:
            self._parallel(self.address, _memory(arguments), threads, 0)

    def alone(self, *arguments: int) -> None:
        """Runs the kernel on the calling thread, which is quicker for little work."""
        self._function(_memory(arguments))

    def bound(self, address: int) -> Callable[[], object]:
        """A function that runs the kernel on the calling thread.

        The kernel's arguments lie at ``address``, behind counters that must be 0.
        """
        return functools.partial(self._function, address)


def _memory(arguments: tuple[int, ...]) -> Any:
    return (ctypes.c_int64 * (COUNTERS + len(arguments)))(0, 0, *arguments)


def _compile(machine: Any, write: Callable[[Any], None]) -> bytes:
    compiling.begins()
    module = ir.Module("rapid")
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    write(module)
    compiled = llvm.parse_assembly(str(module))
    compiled.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(compiled, passes)
    return bytes(machine.emit_object(compiled))


def _kept(path: Path) -> bytes:
    """The code in ``path``, which is run as it is; empty where another user than this one or root can have written it.

    What is looked at is the open file: its name may be another's a moment later.
    """
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b""
    with open(opened, "rb") as file:
        found = os.fstat(opened)
        is_ours = found.st_uid in (0, os.geteuid()) and not found.st_mode & _OTHERS_WRITE
        return file.read() if is_ours and stat.S_ISREG(found.st_mode) else b""


def _keep(code: bytes, path: Path) -> bytes:
    with contextlib.suppress(OSError):  # the next start compiles again
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        Path(file.name).replace(path)  # atomically: other processes read this file
    return code


@functools.cache
def _version(sources: tuple[str, ...]) -> str:
    """A hash of all that the compiled code of the kernels in ``sources`` depends on, except their own parameters.

    That is this machine, LLVM, and the Python code of the writer and the compiler of kernels, without its comments.
    """
    written_by = [Path(__file__), Path(__file__).with_name("ir_builder.py"), *map(Path, sources)]
    parts = [llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), str(llvm.llvm_version_info)]
    parts += [code_of(path.read_text(encoding="utf-8")) for path in written_by]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def code_of(source: str) -> str:
    """Python source without comments, docstrings and white space, none of which changes the computation."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)
