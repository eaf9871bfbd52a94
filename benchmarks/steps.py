"""The time of one forward pass against its floor, from 256 tokens of context to 32K, as a table and a picture.

The floor of a pass is the time in which PyTorch sums as many bytes as the pass must read: the weights once, and the
context's keys and values. So what fits into the caches is compared with what comes from there. Beyond the model's
window the positions are scaled; only speed is measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import rapid  # noqa: F401 (before torch)

# isort: split
import torch

from benchmarks.common.local import MODEL
from benchmarks.common.results import FOLDER, write
from rapid.engine.torch_thread import compute
from rapid.kernels.interface import BatchEntry
from rapid.kv_cache.pool import KVCache
from rapid.models.loader import load_model
from rapid.models.model import Model

CONTEXTS = (256, 1024, 4096, 7000, 16384, 32768)
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.625}  # a weight; int4 with its scale and zero
ROWS = (("plain step", 1), ("verify 5", 5), ("verify 11", 11))


def median_ms(step: Callable[[], object], repeats: int) -> float:
    """The median of ``repeats`` calls after two that do not count, in milliseconds."""
    times = []
    for i in range(repeats + 2):
        started = time.perf_counter()
        step()
        if i >= 2:
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def summing_ms(num_bytes: float) -> float:
    """The time in which so many bytes are summed."""
    return median_ms(torch.ones(int(num_bytes) // 4).sum, 11)


def _step(model: Model, cache: KVCache, context: int, num_tokens: int) -> None:
    cache.length = context
    model.forward([BatchEntry(cache, [1] * num_tokens, num_tokens)])


def measure(contexts: list[int], repeats: int) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    models = {
        "bfloat16": load_model(MODEL, dtype="bfloat16"),
        "float32": load_model(MODEL, dtype="float32"),
        "int4": load_model(MODEL, quantization="int4"),
        "int8": load_model(MODEL, quantization="int8"),
    }
    for name, model in models.items():
        for context in contexts if name in ("bfloat16", "float32") else [c for c in contexts if c <= 4096]:
            pool = model.new_pool((context + 64) * model.layout.bytes_per_token)
            for part in (*pool.keys, *pool.values):
                part.normal_()
            cache = pool.open([0], context + 32)
            assert cache is not None
            row: dict[str, Any] = {"weights": name, "context": context}
            read = (
                model.info.weight_bytes * BYTES[name] / model.layout.dtype.itemsize
                + context * model.layout.bytes_per_token
            )
            row["floor_ms"] = round(summing_ms(read), 2)
            row["gb_per_s"] = round(read / row["floor_ms"] / 1e6, 1)
            for label, num_tokens in ROWS if name in ("bfloat16", "float32") else ROWS[:1]:
                row[label] = round(median_ms(partial(_step, model, cache, context, num_tokens), repeats), 2)
            row["over_floor"] = round(row["plain step"] / row["floor_ms"], 2)
            if "verify 5" in row:
                row["verify_5_over_plain"] = round(row["verify 5"] / row["plain step"], 2)
            rows.append(row)
            print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return {"rows": rows}


def draw(results: dict[str, Any]) -> None:
    """Milliseconds a step over the context, beside the floor: benchmarks/results/steps.svg."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for weights, colour in (("float32", "#8c6bb1"), ("bfloat16", "#2b6cb0")):
        rows = [row for row in results["rows"] if row["weights"] == weights]
        contexts = [row["context"] for row in rows]
        axes.plot(contexts, [row["plain step"] for row in rows], "o-", color=colour, label=f"{weights}: plain step")
        axes.plot(
            contexts, [row["verify 5"] for row in rows], "s--", color=colour, label=f"{weights}: 5 tokens at once"
        )
        axes.plot(contexts, [row["floor_ms"] for row in rows], ":", color=colour, label=f"{weights}: floor")
    axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="milliseconds", xticks=contexts)
    axes.set_xticklabels([f"{c // 1024}K" if c >= 1024 else str(c) for c in contexts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(FOLDER / "steps.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    results = compute(measure, options.contexts, options.repeats)
    write("steps", results)
    draw(results)


if __name__ == "__main__":
    main()
