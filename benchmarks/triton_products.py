"""The Triton products with packed weights without a GPU: distances from float64, and registers, spills and memory.

The distances come from Triton's interpreter, over the largest number of the answer; the rest from compiling for devices
that need not be here. `make test-triton` makes the environment; then `.venv-triton/bin/python -m
benchmarks.triton_products`.
"""

from __future__ import annotations

from typing import Any

import rapid  # noqa: F401 (before torch)

# isort: split
import torch

from benchmarks.common.gpu_compile import TARGETS, compiled, distances_and_needs
from benchmarks.common.product_cases import Case, error
from rapid.kernels.cuda.low_bit import BLOCK, COLUMNS, GROUP, MOST_ROWS, NUM_STAGES, PANEL, PROGRAMS_PER_SM, SCHEMES

ROWS = (1, 2, 5, 16, 17, 64, MOST_ROWS)
POINTERS = {"x": "*bf16", "packed": "*i8", "scales": "*fp32", "bias": "*bf16"}
SIZES = dict.fromkeys(("num_rows", "num_inputs", "num_outputs", "x_stride", "num_blocks", "blocks_per_part"), "i32")


def distances() -> dict[str, float]:
    found = {}
    for scheme in SCHEMES:
        for num_rows in ROWS:
            found[f"{scheme}, {num_rows} rows"] = error(Case(scheme, num_rows))
        found[f"{scheme}, 65 × 1000"] = error(Case(scheme, 5, 65, 1000))
        found[f"{scheme}, float16"] = error(Case(scheme, 5, dtype=torch.float16))
    return found


def all_compiled() -> list[dict[str, Any]]:
    """Every kernel as it is launched, on every target."""
    return [row for target in TARGETS for row in _on(target)]


def _on(target: int) -> list[dict[str, Any]]:
    from rapid.kernels.cuda.low_bit_kernels import add_parts, multiply, unpack

    rows = []
    for scheme in SCHEMES:
        scales = {"scales": "*i32" if scheme == "int4" else "*fp32"}
        block = GROUP if scheme == "int4" else BLOCK
        shape = {"SCHEME": scheme, "PANEL": PANEL, "BLOCK": block}
        for num_rows in (16, 32):
            for split in (False, True):
                signature = POINTERS | scales | {"output": "*fp32" if split else "*bf16"} | SIZES
                constants = shape | {"ROWS": num_rows, "WITH_BIAS": not split}
                needs = compiled(multiply, signature, constants, target, num_stages=NUM_STAGES)
                about = {"kernel": "multiply", "scheme": scheme, "block": block, "rows": num_rows, "split": split}
                rows.append(about | {"programs_per_sm": PROGRAMS_PER_SM} | needs)
        signature = {"packed": "*i8"} | scales | {"weight": "*bf16"}
        signature |= dict.fromkeys(("num_inputs", "num_outputs", "num_blocks"), "i32")
        about = {"kernel": "unpack", "scheme": scheme, "block": block}
        rows.append(about | compiled(unpack, signature, shape, target))
    signature = {"partial": "*fp32", "bias": "*bf16", "output": "*bf16"}
    signature |= dict.fromkeys(("parts", "num_rows", "num_outputs"), "i32")
    needs = compiled(add_parts, signature, {"COLUMNS": COLUMNS, "WITH_BIAS": True}, target)
    return [*rows, {"kernel": "add_parts"} | needs]


if __name__ == "__main__":
    distances_and_needs("triton_products", distances, all_compiled, __doc__)
