"""The Triton attention kernels without a GPU: distances from float64, and registers, spills and memory per target.

The distances come from Triton's interpreter, the rest from compiling for devices that need not be here. `make
test-triton` makes the environment; then `.venv-triton/bin/python -m benchmarks.triton_attention`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import rapid  # noqa: F401 (before torch)

# isort: split
import torch

from benchmarks.common.paged_cases import Case, error
from benchmarks.common.results import write
from rapid.kernels.cuda.paged_split import NUM_STAGES, PROGRAMS_PER_SM, cut

TARGETS = (80, 90)
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


def compiled(capability: int, max_new: int, dtype: torch.dtype = torch.bfloat16, d: int = 128, **flags: bool) -> Any:
    """Registers, spilled bytes and shared memory of `attend_part`, as it is launched, on sm_``capability``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

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
    aligned = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    kernel = triton.compile(
        ASTSource(
            fn=attend_part,
            signature=signature | dict.fromkeys(constants, "constexpr"),
            constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in [*aligned, list(signature).index("query_stride")]},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": made.num_warps, "num_stages": NUM_STAGES},
    )
    report = _assembler_report(Path(triton.__file__).parent / "backends/nvidia/bin/ptxas", kernel.asm["ptx"])
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    assert spills is not None and registers is not None, report
    return {
        "target": f"sm_{capability}",
        "type": NAMES[dtype],
        "d": d,
        **flags,
        "rows": made.rows,
        "threads": 32 * made.num_warps,
        "registers": int(registers[1]),
        "spilled_bytes": int(spills[1]) + int(spills[2]),
        "shared_bytes": kernel.metadata.shared,
        "programs_per_sm": PROGRAMS_PER_SM[made.rows],
    }


def _assembler_report(ptxas: Path, ptx: str) -> str:
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={target[1]}", source, "-o", source.with_suffix(".cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def all_compiled() -> list[dict[str, Any]]:
    """Every number of rows on every target, and each option once; float8 needs sm_89."""
    rows = []
    for target in TARGETS:
        rows += [compiled(target, max_new) for max_new in (1, 5, 9, 17)]
        rows += [compiled(target, 17, **{flag: True}) for flag in ("windowed", "chosen", "prefix", "rest")]
        rows += [compiled(target, 17, d=d) for d in (64, 256)]
        rows.append(compiled(target, 17, torch.float32))
    return rows + [compiled(90, max_new, fp8=True) for max_new in (1, 17)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["distances", "compiled"], help="print this part, write nothing")
    only = parser.parse_args().only
    if only == "distances":
        print(json.dumps({name: error(case) for name, case in CASES.items()}))
    elif only == "compiled":
        print(json.dumps(all_compiled()))
    else:
        distances, registers = _run("distances", {"TRITON_INTERPRET": "1"}), _run("compiled", {})
        versions = {"triton": metadata.version("triton")}
        write("triton_attention", {**versions, "distance_from_float64": distances, "compiled": registers})


def _run(part: str, more: dict[str, str]) -> Any:
    """A part in a process of its own: Triton decides when it is imported whether it interprets or compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | more
    command = [sys.executable, "-m", "benchmarks.triton_attention", "--only", part]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
