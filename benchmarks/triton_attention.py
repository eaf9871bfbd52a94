"""The Triton attention kernels without a GPU: distances from float64, and registers, spills and memory per target.

The distances come from Triton's interpreter, the rest from compiling for devices that need not be here. `make
test-triton` makes the environment; then `.venv-triton/bin/python -m benchmarks.triton_attention`.
"""

from __future__ import annotations

from typing import Any

import rapid  # noqa: F401 (before torch)

# isort: split
import torch

from benchmarks.common.gpu_compile import TARGETS, compiled, distances_and_needs
from benchmarks.common.paged_cases import Case, error
from rapid.kernels.cuda.paged_split import MAX_PARTS, NUM_STAGES, PROGRAMS_PER_SM, cut

GROUP, KV_HEADS, PAGE = 4, 8, 256
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = {
    **dict.fromkeys(
        ("table", "page_positions", "pages_used", "lengths", "starts", "shared_pages", "table_rows"), "*i32"
    ),
    **dict.fromkeys(("key_scales", "value_scales", "partial", "partial_lse"), "*fp32"),
}
NUMBERS = {
    **dict.fromkeys(("first_part", "all_parts"), "i32"),
    "scaling": "fp32",
    **dict.fromkeys(("sinks", "window", "query_stride", "table_width"), "i32"),
}

CASES = {
    "decode": Case([(700, 1), (33, 1), (255, 1)], d=64, page_size=256),
    "ragged, 1 to 17 new tokens": Case([(75, 1), (40, 17), (0, 3), (300, 9)]),
    "9 heads a group": Case([(75, 1), (40, 17)], group=9),
    "eight sequences": Case([(0, 3), (75, 1), (40, 17), (7, 2), (33, 16), (100, 5), (1, 1), (300, 9)], group=2),
    "sinks and window": Case([(300, 5), (20, 2)], sinks=4, window=33),
    "chosen pages": Case([(300, 5), (20, 2)], chosen=[[19, 3, 0], [1]]),
    "shared pages": Case([(300, 5), (200, 17), (33, 2)], groups=[(0, 2, 12), (2, 3, 0)]),
    "float16": Case([(300, 5), (20, 17)], dtype=torch.float16, d=64),
    "float8 keys and values": Case([(300, 5), (20, 17)], fp8=True, d=64),
}


def attention(capability: int, max_new: int, dtype: torch.dtype = torch.bfloat16, d: int = 128, **flags: bool) -> Any:
    """What `attend_part` needs as it is launched on sm_``capability``."""
    from rapid.kernels.cuda.split_kernels import attend_part

    made = cut(1, (GROUP * KV_HEADS, KV_HEADS), d, dtype, max_new=max_new, width=480, page_size=PAGE, num_sms=132)
    constants = {
        "PAGE": PAGE,
        "KV_HEADS": KV_HEADS,
        "GROUP": GROUP,
        "D": d,
        "BLOCK_D": made.block_d,
        "ROWS": made.rows,
        "BLOCK": made.block,
        "WINDOWED": flags.get("windowed", False),
        "CHOSEN": flags.get("chosen", False),
        "SCALED": flags.get("fp8", False),
        "PREFIX": flags.get("prefix", False),
        "REST": flags.get("rest", False),
    }
    stored = "*fp8e4nv" if flags.get("fp8") else f"*{NAMES[dtype]}"
    signature = {"query": f"*{NAMES[dtype]}", "keys": stored, "values": stored, **POINTERS, **NUMBERS}
    needs = compiled(attend_part, signature, constants, capability, num_warps=made.num_warps, num_stages=NUM_STAGES)
    return {
        "kernel": "attend_part",
        "type": NAMES[dtype],
        "d": d,
        **flags,
        "rows": made.rows,
        "programs_per_sm": PROGRAMS_PER_SM[made.rows],
        **needs,
    }


def combination(capability: int, d: int = 128) -> Any:
    """What `combine_parts` needs for as many parts as there may be."""
    from rapid.kernels.cuda.split_kernels import combine_parts

    pointers = {"partial": "*fp32", "partial_lse": "*fp32", "starts": "*i32", "output": "*bf16"}
    signature = {**pointers, "num_sequences": "i32", "parts": "i32"}
    constants = {"HEADS": GROUP * KV_HEADS, "D": d, "BLOCK_D": d, "BLOCK_PARTS": MAX_PARTS}
    return {"kernel": "combine_parts", "d": d, **compiled(combine_parts, signature, constants, capability)}


def all_compiled() -> list[dict[str, Any]]:
    """Every number of rows on every target, and each option once; float8 needs sm_89."""
    rows = []
    for target in TARGETS:
        rows += [attention(target, max_new) for max_new in (1, 5, 9, 17)]
        rows += [attention(target, 17, **{flag: True}) for flag in ("windowed", "chosen", "prefix", "rest")]
        rows += [attention(target, 17, d=d) for d in (64, 256)]
        rows.append(attention(target, 17, torch.float32))
        rows += [combination(target), combination(target, 256)]
        if target >= 89:
            rows += [attention(target, max_new, fp8=True) for max_new in (1, 17)]
    return rows


if __name__ == "__main__":
    distances_and_needs(
        "triton_attention", lambda: {name: error(case) for name, case in CASES.items()}, all_compiled, __doc__
    )
