"""The one door to Triton, which PyTorch brings on CUDA.

Without Triton `jit` returns the function as it is: files of kernels can be imported, and no kernel can be launched.
"""

from __future__ import annotations

from rapid.kernels import compiling

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    if triton.knobs.runtime.jit_cache_hook is None:  # called before a kernel is compiled, for each kind of arguments
        triton.knobs.runtime.jit_cache_hook = compiling.begins
except ImportError:
    tl = None

    def jit(kernel):
        return kernel


__all__ = ["jit", "tl"]
