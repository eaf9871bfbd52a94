"""What is known of Triton kernels without a GPU: distances from float64 in the interpreter, and what compiling says."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.common.results import write

TARGETS = (80, 90, 100, 120)  # A100, H100 and H200, B200, and the newest that this Triton knows


def compiled(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
) -> dict[str, Any]:
    """What ``kernel`` needs on sm_``capability``, launched with aligned pointers and strides.

    ``signature`` has Triton's type of each argument that is no constant. Numbers named "..._stride" are multiples of
    16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [
        i for i, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or name.endswith("_stride")
    ]
    built = triton.compile(
        ASTSource(
            fn=kernel,
            signature={**signature, **dict.fromkeys(constants, "constexpr")},
            constexprs=dict(constants),
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    report = _assembler_report(capability, built.asm["ptx"])
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    assert spills is not None and registers is not None, report
    return {
        "target": f"sm_{capability}",
        "threads": 32 * num_warps,
        "registers": int(registers[1]),
        "spilled_bytes": int(spills[1]) + int(spills[2]),
        "shared_bytes": built.metadata.shared,
    }


def _assembler_report(capability: int, ptx: str) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            get_ptxas(capability).path,
            "-v",
            f"--gpu-name={target[1]}",
            source,
            "-o",
            source.with_suffix(".cubin"),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def distances_and_needs(
    name: str, distances: Callable[[], Any], needs: Callable[[], Any], description: str | None
) -> None:
    """The command `python -m benchmarks.NAME`, which writes both to its results.

    Each is found in a process of its own: Triton decides when it is imported whether it interprets or compiles.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", choices=["distances", "compiled"], help="print this part, write nothing")
    only = parser.parse_args().only
    if only is not None:
        print(json.dumps(distances() if only == "distances" else needs()))
        return
    found, registers = _run(name, "distances", {"TRITON_INTERPRET": "1"}), _run(name, "compiled", {})
    versions = {"triton": metadata.version("triton")}
    write(name, {**versions, "distance_from_float64": found, "compiled": registers})


def _run(name: str, part: str, more: dict[str, str]) -> Any:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | more
    command = [sys.executable, "-m", f"benchmarks.{name}", "--only", part]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
