"""Stored keys and values of 8 bits against bfloat16: the time of a pass, memory, and what the model makes of a text.

Each pass is timed in turn with each type, so that all see the same changes of the machine's speed. Beyond the model's
window only speed is measured. Quality: the model reads books, and every type's next-token distributions behind 4K
tokens of context are compared, position by position.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import rapid  # noqa: F401 (before torch)

# isort: split
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.common.local import MODEL
from benchmarks.common.results import DATA, write
from rapid.engine.torch_thread import compute
from rapid.kernels.cuda.attention import PagedAttention, gathered_sdpa
from rapid.kernels.interface import BatchEntry
from rapid.kv_cache.pool import KVCache
from rapid.models.loader import load_model
from rapid.models.model import Model
from rapid.text.tokenizer import load_tokenizer
from rapid.weights import embedded_models

CONTEXTS = (7000, 32768)
ROWS = (("plain step", 1), ("verify 5", 5), ("verify 11", 11))
BOOKS = ("moby-dick", "pride-and-prejudice")
SKIPPED = 2000  # tokens of titles and contents
CONTEXT = 4096  # tokens before the first compared position
CHUNK = 256


def opened(model: Model, num_tokens: int) -> KVCache:
    pool = model.new_pool((num_tokens + CHUNK) * model.layout.bytes_per_token)  # pages are whole
    cache = pool.open([0], num_tokens)
    assert cache is not None
    return cache


def filled(model: Model, context: int) -> KVCache:
    """A cache that holds a short random prompt over and over."""
    cache = opened(model, context + 32)
    tokens = torch.randint(0, model.vocab_size, (CHUNK,), generator=torch.Generator().manual_seed(0)).tolist()
    model.forward([BatchEntry(cache, tokens, 0)])
    for rows in (*cache.pool.keys, *cache.pool.values):
        written = rows[:, :CHUNK]
        for start in range(CHUNK, rows.shape[1], CHUNK):
            part = rows[:, start : start + CHUNK]
            part.copy_(written[:, : part.shape[1]])
    return cache


def timed(models: dict[str, Model], context: int, repeats: int) -> Iterator[dict[str, Any]]:
    caches = {name: filled(model, context) for name, model in models.items()}
    for label, num_tokens in ROWS:
        times: dict[str, list[float]] = {name: [] for name in models}
        for i in range(repeats + 2):
            for name, cache in caches.items():
                cache.length = context
                started = time.perf_counter()
                models[name].forward([BatchEntry(cache, [1] * num_tokens, num_tokens)])
                if i >= 2:
                    times[name].append((time.perf_counter() - started) * 1e3)
        row: dict[str, Any] = {"context": context, "pass": label}
        row |= {f"{name}_ms": round(statistics.median(each), 2) for name, each in times.items()}
        ratios = [a / b for a, b in zip(times["int8"], times["bfloat16"], strict=True)]
        row["int8_over_bfloat16"] = round(statistics.median(ratios), 3)
        print(row, flush=True)
        yield row


def log_probabilities(model: Model, tokens: list[int]) -> Iterator[Tensor]:
    """Log-probabilities [chunk, V] behind every token from CONTEXT on."""
    cache = opened(model, len(tokens))
    for start in range(0, len(tokens), CHUNK):
        part = tokens[start : start + CHUNK]
        (logits,) = model.forward([BatchEntry(cache, part, len(part) if start >= CONTEXT else 0)])
        if len(logits):
            yield logits.log_softmax(-1)


def compared(models: dict[str, Model], tokens: list[int]) -> dict[str, Any]:
    """Sums over the positions of one text: the same argmax as bfloat16, KL(bfloat16 ‖ other), −log p of the next."""
    targets = torch.tensor([*tokens[CONTEXT + 1 :], 0])
    sums = {name: {"same": 0.0, "kl": 0.0, "nll": 0.0} for name in models}
    start, last = 0, len(targets) - 1
    for parts in zip(*(log_probabilities(model, tokens) for model in models.values()), strict=True):
        end = min(start + CHUNK, last)
        base = parts[0][: end - start]
        for name, part in zip(models, parts, strict=True):
            own = part[: end - start]
            sums[name]["same"] += (own.argmax(-1) == base.argmax(-1)).sum().item()
            sums[name]["kl"] += (base.exp() * (base - own)).sum().item()
            sums[name]["nll"] -= own.gather(1, targets[start:end, None]).sum().item()
        start = end
    return {"positions": last, "sums": sums}


def quality(models: dict[str, Model], positions: int) -> dict[str, Any]:
    total, positions_in_all = {name: {"same": 0.0, "kl": 0.0, "nll": 0.0} for name in models}, 0
    for book in BOOKS:
        text = (DATA / f"{book}.txt").read_text(encoding="utf-8")[: 8 * (SKIPPED + CONTEXT + positions)]
        tokenizer = models["bfloat16"].tokenizer
        assert tokenizer is not None
        tokens = tokenizer(text)["input_ids"][SKIPPED : SKIPPED + CONTEXT + positions + 1]
        found = compared(models, tokens)
        positions_in_all += found["positions"]
        for name, sums in found["sums"].items():
            for key, value in sums.items():
                total[name][key] += value
    n = positions_in_all
    rows = {
        name: {
            "argmax_agreement": round(sums["same"] / n, 4),
            "perplexity": round(float(torch.tensor(sums["nll"] / n).exp()), 4),
            "kl_from_bfloat16": round(sums["kl"] / n, 6),
        }
        for name, sums in total.items()
    }
    for name, row in rows.items():
        print(name, row, flush=True)
    return {"books": BOOKS, "positions": n, "context": CONTEXT, "by_dtype": rows}


def fp8_on_cpu() -> Model:
    """fp8 as on CUDA, with the reference kernel: for quality only."""
    network = AutoModelForCausalLM.from_pretrained(embedded_models.resolve(MODEL), dtype=torch.bfloat16)
    return Model(network, load_tokenizer(MODEL), MODEL, kv_dtype="fp8", attention=PagedAttention(gathered_sdpa))


def measure(contexts: list[int], repeats: int, positions: int) -> dict[str, Any]:
    models = {
        "bfloat16": load_model(MODEL, dtype="bfloat16"),
        "int8": load_model(MODEL, dtype="bfloat16", kv_dtype="int8"),
    }
    results: dict[str, Any] = {}
    if repeats:
        results["passes"] = [row for context in contexts for row in timed(models, context, repeats)]
    if positions:
        models |= {"fp8": fp8_on_cpu(), "float32": load_model(MODEL, dtype="float32")}
        results["bytes_per_token"] = {name: model.layout.bytes_per_token for name, model in models.items()}
        results["quality"] = quality(models, positions)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--repeats", type=int, default=21, help="of each pass; 0: only quality")
    parser.add_argument("--positions", type=int, default=1024, help="of each book; 0: only passes")
    options = parser.parse_args()
    results = compute(measure, options.contexts, options.repeats, options.positions)
    write("kv_dtype", results, part="" if options.repeats and options.positions else "part")


if __name__ == "__main__":
    main()
