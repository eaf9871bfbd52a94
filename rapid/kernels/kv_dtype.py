"""Types of stored keys and values, by name, and which of them a device can read."""

from __future__ import annotations

import torch

from rapid.errors import ModelFileError
from rapid.kernels.cpu.attention_plan import supports_layout
from rapid.kv_cache.pool import KVLayout

# None: the model's own type.
KV_DTYPES: dict[str, torch.dtype | None] = {"auto": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def check_kv_dtype(layout: KVLayout) -> None:
    """Checks that there are kernels over pages of ``layout`` on its devices.

    Raises:
        ModelFileError: 8-bit floats are for CUDA, 8-bit integers for a CPU with a model in bfloat16; or a kernel cannot
            be compiled here.
    """
    kinds = {device.type for device in layout.devices}
    if layout.stored_dtype == torch.float8_e4m3fn:
        if kinds != {"cuda"}:
            raise ModelFileError("kv_dtype 'fp8' is for CUDA: on a CPU set kv_dtype to int8 or auto")
        if layout.dtype == torch.float32:
            raise ModelFileError("kv_dtype 'fp8' goes with dtype bfloat16 or float16: leave dtype at auto")
    elif layout.stored_dtype == torch.int8:
        if kinds != {"cpu"}:
            raise ModelFileError("kv_dtype 'int8' is for a CPU: on CUDA set kv_dtype to fp8 or auto")
        if layout.dtype != torch.bfloat16:
            raise ModelFileError("kv_dtype 'int8' goes with dtype bfloat16: leave dtype at auto")
        if not supports_layout(layout):
            raise ModelFileError(
                "kv_dtype 'int8' needs llvmlite on Linux and heads of a multiple of 32 numbers, "
                f"found heads of {layout.head_dim}: set kv_dtype to auto"
            )
