"""The fused Triton kernels without a GPU: distances from float64, and registers, spills and memory per target.

The distances come from Triton's interpreter, over the largest number of the answer; the rest from compiling for devices
that need not be here. `make test-triton` makes the environment; then `.venv-triton/bin/python -m
benchmarks.triton_fused`.
"""

from __future__ import annotations

from typing import Any

import rapid  # noqa: F401 (before torch)

# isort: split
import torch
from torch import Tensor

from benchmarks.common.gpu_compile import TARGETS, compiled, distances_and_needs
from rapid.kernels.cuda.fused import (
    GATE_BLOCK,
    HEADS,
    ROTATING_WARPS,
    add_norm,
    gate,
    norm_warps,
    triton_rotate_and_write,
)

HIDDEN = (2048, 4096, 8192, 16384)
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NUM_HEADS, KV_HEADS = 32, 8


def distances() -> dict[str, float]:
    found = {}
    for name, dtype in TYPES.items():
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int, dtype: torch.dtype = dtype, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        x, more, weight = random(5, 4096), random(5, 4096), random(4096)
        total, normed = add_norm(x, more, weight, 1e-5)
        exact = total.double() / (total.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        found[f"sum and norm, {name}"] = _apart(normed, exact)
        gates = random(5, 2 * 14336)
        first, second = gates.double().chunk(2, -1)
        found[f"gate, {name}"] = _apart(gate(gates), first * first.sigmoid() * second)
        heads, angles = random(5, NUM_HEADS + 2 * KV_HEADS, 128), random(5, 64).repeat(1, 2)
        rotation = angles.cos(), angles.sin()
        unit = torch.complex(*(each.double()[:, None, :64] for each in rotation))
        turned = torch.complex(*heads.double().chunk(2, -1)) * unit
        keys, values = torch.zeros(5, KV_HEADS, 128, dtype=dtype), torch.zeros(5, KV_HEADS, 128, dtype=dtype)
        query = triton_rotate_and_write(heads, rotation, torch.arange(5), keys, values)
        exact = torch.cat((turned.real, turned.imag), -1)[:, : NUM_HEADS + KV_HEADS]
        found[f"rotation, {name}"] = _apart(torch.cat((query, keys), 1), exact)
    return found


def _apart(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()


def all_compiled() -> list[dict[str, Any]]:
    """Every kernel as it is launched, on every target; float8 needs sm_89."""
    return [row for target in TARGETS for row in _on(target)]


def _on(target: int) -> list[dict[str, Any]]:
    from rapid.kernels.cuda.fused_kernels import add_norm_row, gate_row, rotate_and_write_heads

    rows = []
    for name in TYPES:
        for hidden in HIDDEN:
            signature = dict.fromkeys(("x", "more", "weight", "total", "normed"), f"*{name}")
            signature |= {"size": "i32", "eps": "fp32"}
            needs = compiled(add_norm_row, signature, {"BLOCK": hidden}, target, num_warps=norm_warps(hidden))
            rows.append({"kernel": "add_norm_row", "type": name, "size": hidden} | needs)
        signature = {"x": f"*{name}", "output": f"*{name}", "size": "i32"}
        rows.append({"kernel": "gate_row", "type": name} | compiled(gate_row, signature, {"BLOCK": GATE_BLOCK}, target))
        for stored in (name, "fp8e4nv") if target >= 89 else (name,):
            for d in (64, 128, 256):
                signature = dict.fromkeys(("heads", "cos", "sin"), f"*{name}") | {"slots": "*i64"}
                signature |= {"keys": f"*{stored}", "values": f"*{stored}"}
                signature |= {"heads_stride": "i32", "angles_stride": "i32"}
                constants = {"NUM_HEADS": NUM_HEADS, "KV_HEADS": KV_HEADS, "D": d, "BLOCK_HALF": d // 2, "HEADS": HEADS}
                needs = compiled(rotate_and_write_heads, signature, constants, target, num_warps=ROTATING_WARPS)
                rows.append({"kernel": "rotate_and_write_heads", "type": name, "stored": stored, "d": d} | needs)
    return rows


if __name__ == "__main__":
    distances_and_needs("triton_fused", distances, all_compiled, __doc__)
