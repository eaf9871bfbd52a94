"""Prefill, decode, draft and verify at Llama-3.1-8B's shape with random weights, from 4K to 128K tokens, on one GPU.

Needs only torch, transformers and accelerate. Speeds do not depend on the values of the weights, but acceptance does.
So the end-to-end speed is that of real rounds (a draft of γ tokens, one verification) with a given acceptance. `--tiny`
runs every path on a small shape, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rapid  # noqa: F401 (before torch)

# isort: split
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from rapid.kernels.cuda.attention import PagedAttention, gathered_sdpa
from rapid.kernels.interface import BatchEntry
from rapid.kv_cache.pool import KVCache
from rapid.models.model import Model

SHAPE_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
SHAPE_TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
}
DRAFT_CONTEXT, GAMMA, ACCEPTANCE, CHUNK = 4096, 4, 0.77, 2048


def network(shape: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """A model of ``shape`` with random weights, made on the device."""
    with device:
        made: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    return made.eval()


def load(shape: dict[str, Any], device: torch.device, quantization: str = "none") -> Model:
    attention = PagedAttention(gathered_sdpa) if device.type == "cpu" else None
    return Model(network(shape, device), None, "random", quantization=quantization, attention=attention)


def median_ms(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    times = []
    for i in range(repeats + 2):
        _wait(device)
        started = time.perf_counter()
        step()
        _wait(device)
        if i >= 2:
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peaks(device: torch.device) -> tuple[float, float]:
    """Measured on this device: bytes per millisecond of a copy, and operations per millisecond of a matrix product."""
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.empty(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    moved = 2 * size / median_ms(lambda: target.copy_(source), device, 11)
    n = 8192 if device.type == "cuda" else 256
    matrix = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    return moved, 2 * n**3 / median_ms(lambda: matrix @ matrix, device, 11)


def open_cache(model: Model, context: int) -> KVCache:
    """A cache of ``context`` tokens of noise, in a pool of its own."""
    pool = model.new_pool((context + 512) * model.layout.bytes_per_token + (1 << 20))
    for part in (*pool.keys, *pool.values):
        part.normal_()
    cache = pool.open([0], context + 64)
    assert cache is not None
    return cache


def step_ms(model: Model, cache: KVCache, context: int, num_tokens: int, repeats: int) -> float:
    """One pass over ``num_tokens`` behind ``context`` tokens, with logits of all of them."""

    def step() -> None:
        cache.length = context
        model.forward([BatchEntry(cache, [1] * num_tokens, num_tokens)])

    return median_ms(step, model.layout.device, repeats)


def prefill(model: Model, context: int) -> float:
    """The speed of a prefill of ``context`` tokens in chunks, in tokens per second."""
    cache = open_cache(model, context)
    device = model.layout.device
    chunk = torch.ones(min(CHUNK, context), dtype=torch.long, device=device)

    def read() -> None:
        cache.length = 0
        while cache.length < context:
            model.forward([BatchEntry(cache, chunk[: context - cache.length], 0)])

    return context / median_ms(read, device, 1) * 1e3


def end_to_end(target: Model, drafter: Model, context: int, draft_context: int, new: int) -> dict[str, float]:
    """Tokens per second of plain decoding, and of rounds that accept each draft token with probability `ACCEPTANCE`."""
    far, near = open_cache(target, context), open_cache(drafter, draft_context)
    device, chance = target.layout.device, random.Random(0)

    def plain() -> None:
        far.length = context
        for _ in range(new):
            logits = target.forward([BatchEntry(far, [1], 1)])[0]
            int(logits.argmax())
            far.truncate(context + 32)

    def drafted() -> None:
        far.length, near.length, written = context, draft_context, 0
        while written < new:
            feed: Any = [1]
            tokens = []
            for _ in range(GAMMA):
                token = drafter.forward([BatchEntry(near, feed, 1)])[0].argmax(-1)
                tokens.append(token)
                feed = token
            drafts = torch.cat([torch.ones(1, dtype=torch.long, device=device), *tokens])
            rows = target.forward([BatchEntry(far, drafts, GAMMA + 1)])[0]
            rows.argmax(-1).tolist()
            accepted = next((i for i in range(GAMMA) if chance.random() >= ACCEPTANCE), GAMMA)
            far.truncate(min(context + 32, far.length - GAMMA + accepted))
            near.truncate(min(draft_context + 32, near.length))
            written += accepted + 1

    plain_s, drafted_s = (median_ms(run, device, 3) / 1e3 for run in (plain, drafted))
    return {"plain": new / plain_s, "rapid": new / drafted_s, "ratio": plain_s / drafted_s}


@torch.inference_mode()
def stock(shape: dict[str, Any], device: torch.device, context: int, new: int) -> float:
    """Tokens per second of transformers' generate behind a prompt of ``context`` tokens."""
    made = network(shape, device)
    ids = torch.ones(1, context, dtype=torch.long, device=device)
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0}

    def seconds(tokens: int) -> float:
        return (
            median_ms(
                lambda: made.generate(input_ids=ids, min_new_tokens=tokens, max_new_tokens=tokens, **options), device, 1
            )
            / 1e3
        )

    return (new - 1) / max(1e-9, seconds(new) - seconds(1))


def measure(
    shape: dict[str, Any], contexts: list[int], quantizations: list[str], device: torch.device
) -> dict[str, Any]:
    per_ms, flops = peaks(device)
    repeats, new = (15, 64) if device.type == "cuda" else (3, 8)
    draft_context = min(DRAFT_CONTEXT, max(contexts))
    results: dict[str, Any] = {"bandwidth_tb_per_s": per_ms / 1e9, "matrix_tflops": flops / 1e9, "rows": []}
    target = load(shape, device)
    for context in contexts:
        cache = open_cache(target, context)
        floor = (target.info.weight_bytes + context * target.layout.bytes_per_token) / per_ms
        decode, verify = (step_ms(target, cache, context, n, repeats) for n in (1, 11))
        speed = prefill(target, context)
        # Two operations a weight and token, and four a head dimension, query and key.
        heads = shape["num_attention_heads"] * (shape["hidden_size"] // shape["num_attention_heads"])
        work = (
            2 * target.info.weight_bytes / target.layout.dtype.itemsize + 2 * target.layout.num_layers * heads * context
        )
        row = {
            "context": context,
            "decode_ms": decode,
            "floor_ms": floor,
            "share_of_floor": floor / decode,
            "verify_11_over_plain": verify / decode,
            "prefill_tokens_per_second": speed,
            "share_of_matrix_peak": speed * work / (flops * 1e3),
        }
        results["rows"].append(row)
        print(row, flush=True)
        del cache
    for quantization in quantizations:
        try:
            drafter = load(shape, device, quantization)
        except Exception as error:
            results[f"drafter_{quantization}"] = {"error": str(error)}
            print(f"drafter {quantization}: {error}", flush=True)
            continue
        draft = step_ms(drafter, open_cache(drafter, draft_context), draft_context, 1, repeats)
        floor = (drafter.info.weight_bytes + draft_context * drafter.layout.bytes_per_token) / per_ms
        speeds = end_to_end(target, drafter, max(contexts), draft_context, new)
        results[f"drafter_{quantization}"] = {"draft_ms": draft, "bf16_floor_ms": floor, "end_to_end": speeds}
        print(quantization, results[f"drafter_{quantization}"], flush=True)
        del drafter
    del target
    results["generate_tokens_per_second"] = stock(shape, device, max(contexts), new)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small shape, to try every path")
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--quantizations", nargs="+", default=["none", "int8", "fp8", "int4"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    contexts = options.contexts or ([256, 512] if options.tiny else [4096, 32768, 65536, 122880])
    with torch.inference_mode():
        results = measure(SHAPE_TINY if options.tiny else SHAPE_8B, contexts, options.quantizations, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    results = {"device": name, "torch": torch.__version__, **results}
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
