"""The cost of requests to each other: shared prefixes, eight at once, a short one during a long prefill, memory."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

import rapid  # noqa: F401 (before torch)

# isort: split
from benchmarks.common.local import MODEL, config, run
from benchmarks.common.questions import questions
from benchmarks.common.results import write
from deployments.builders import local_backend
from deployments.config import AppConfig
from rapid.backend.local import LocalBackend
from rapid.text.tokenizer import load_tokenizer

PLAIN = {"strategy": "autoregressive"}


async def shared_prefix(backend: LocalBackend, settings: AppConfig, prompt_tokens: int) -> dict[str, Any]:
    """The time to the first token of a document's first question, and of its second."""
    asked = list(questions(load_tokenizer(MODEL), prompt_tokens))
    ratios, rows = [], []
    for first, second in zip(asked[::2], asked[1::2], strict=True):
        before = await run(backend, settings, first.prompt, 0, 2, strategy="rapid")
        after = await run(backend, settings, second.prompt, 0, 2, strategy="rapid")
        ratios.append(after.first_s / before.first_s)
        prefill_s = before.statistics.timings_ms["target_prefill"] / 1e3
        rows.append(
            {
                "document": first.document,
                "first_s": round(before.first_s, 2),
                "second_s": round(after.first_s, 2),
                "cached_tokens": after.statistics.cached_tokens,
                "prefill_tokens_per_second": round(len(first.prompt.tokens) / prefill_s, 1),
            }
        )
        print(f"  shared prefix {rows[-1]}", flush=True)
    return {"rows": rows, "median_ratio": round(statistics.median(ratios), 4)}


async def concurrent(backend: LocalBackend, settings: AppConfig, num: int, new_tokens: int) -> dict[str, Any]:
    """Tokens per second of ``num`` requests at once over those of one, each of about 1K tokens, prefilled before."""
    asked = [q for n in (900, 950) for q in questions(load_tokenizer(MODEL), n)][:num]
    for question in asked:
        await run(backend, settings, question.prompt, 0.5, 1, **PLAIN)

    async def rate(some: list[Any]) -> float:
        started = time.perf_counter()
        runs = await asyncio.gather(*(run(backend, settings, q.prompt, 0.5, new_tokens, **PLAIN) for q in some))
        return sum(r.statistics.emitted for r in runs) / (time.perf_counter() - started)

    pairs = [(await rate(asked[:1]), await rate(asked)) for _ in range(3)]
    one, many = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = round(statistics.median(b / a for a, b in pairs), 2)
    print(f"  {num} at once: {many:.1f} tokens/s against {one:.1f}: {ratio}x", flush=True)
    return {"requests": num, "one": round(one, 1), "all": round(many, 1), "ratio": ratio}


async def during_prefill(backend: LocalBackend, settings: AppConfig, prompt_tokens: int) -> dict[str, Any]:
    """The time to the first token of a short request that comes during the prefill of a long prompt."""
    tokenizer = load_tokenizer(MODEL)
    long = next(iter(questions(tokenizer, prompt_tokens, skip=100_000)))  # not read before
    short = next(iter(questions(tokenizer, 150)))
    reading = asyncio.create_task(run(backend, settings, long.prompt, 0, 1, **PLAIN))
    await asyncio.sleep(2)
    quick = await run(backend, settings, short.prompt, 0, 1, **PLAIN)
    whole = await reading
    row = {
        "short_tokens": len(short.prompt.tokens),
        "long_tokens": len(long.prompt.tokens),
        "long_cached": whole.statistics.cached_tokens,
        "short_first_s": round(quick.first_s, 2),
        "long_prefill_s": round(whole.first_s, 2),
        "ratio": round(quick.first_s / whole.first_s, 4),
    }
    print(f"  during a prefill {row}", flush=True)
    return row


async def memory(settings: AppConfig, prompt_tokens: int) -> dict[str, Any]:
    """The largest resident size while a long prompt is prefilled and continued, less that of the loaded models.

    The activations of a chunk are included; they are not measured separately.
    """
    with local_backend(settings) as backend:
        short, long = (next(iter(questions(load_tokenizer(MODEL), n))) for n in (100, prompt_tokens))
        await run(backend, settings, short.prompt, 0, 2, **PLAIN)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        await run(backend, settings, long.prompt, 0, 8, **PLAIN)
        peak = _status("VmHWM")
        kv_bytes = (len(long.prompt.tokens) + 8) * backend.info("target").kv_bytes_per_token
    row = {
        "kv_mib": round(kv_bytes / 2**20, 1),
        "peak_beyond_weights_mib": round((peak - before) / 2**20, 1),
        "ratio": round((peak - before) / kv_bytes, 3),
    }
    print(f"  memory {row}", flush=True)
    return row


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=6900)
    parser.add_argument("--new-tokens", type=int, default=48)
    options = parser.parse_args()
    settings = config()

    async def measure() -> dict[str, Any]:
        results: dict[str, Any] = {"memory": await memory(settings, options.prompt_tokens)}
        with local_backend(settings) as backend:
            results["shared_prefix"] = await shared_prefix(backend, settings, options.prompt_tokens)
            results["concurrent"] = await concurrent(backend, settings, 8, options.new_tokens)
            results["during_prefill"] = await during_prefill(backend, settings, options.prompt_tokens)
        return results

    write("serving", asyncio.run(measure()))


if __name__ == "__main__":
    main()
