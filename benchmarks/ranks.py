"""A model on three ranks against one process: the same greedy drafts, the share of the weights on each, and memory.

Weights are counted as they are loaded, before they are packed in fewer bits. Memory is each process's largest resident
set, and its resident set before the model: Python, PyTorch and transformers. Below float32 each rank rounds its part of
every sum, so a near tie may be decided differently. The ranks share two cores here, so speed is not measured.
"""

from __future__ import annotations

import argparse
import resource
from contextlib import suppress
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from benchmarks.common.questions import questions
from benchmarks.common.results import write
from benchmarks.common.served import free_port
from rapid.engine.engine import Engine
from rapid.engine.messages import DraftRequest, SequenceRequest
from rapid.engine.propose import propose
from rapid.engine.verify import prefill
from rapid.errors import EngineLost
from rapid.models.info import RankPlacement
from rapid.models.loader import load_model
from rapid.models.model import Model
from rapid.models.tensor_parallel import follow
from rapid.sampling.params import SamplingParams
from rapid.speculation.draft import DraftLimits
from rapid.text.tokenizer import load_tokenizer

MODEL = "smollm2-135m-instruct"
FORMATS = {"float32": ("float32", "none"), "bfloat16": ("bfloat16", "none"), "int8": ("bfloat16", "int8")}
KV_BYTES = 2**27


def drafts(model: Model, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """The greedy drafts behind each prompt, of one sequence after the other."""
    engine, found = Engine(model, kv_bytes=KV_BYTES), []
    for prompt in prompts:
        sequence = engine.open(SequenceRequest(prompt, num_tokens, SamplingParams(temperature=0))).result()
        engine.submit(prefill(sequence)).result()
        draft = engine.submit(propose(sequence, DraftRequest(0, [], DraftLimits(num_tokens)), frozenset())).result()
        found.append(draft.tokens)
        engine.close(sequence)
    engine.shutdown()
    return found


def rank(number: int, num_ranks: int, address: str, form: str, asked: tuple[Any, ...], reports: Any) -> None:
    """One process: of several ranks, or the only one."""
    torch.set_num_threads(1 if num_ranks > 1 else 2)
    dtype, quantization = FORMATS[form]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    placement = RankPlacement(number, num_ranks, address) if num_ranks > 1 else None
    model = load_model(MODEL, dtype=dtype, quantization=quantization, device="cpu", placement=placement)
    report = {"rank": number, "weight_bytes": model.info.weight_bytes}
    if number == 0:
        report["drafts"] = drafts(model, *asked)
    else:
        with suppress(EngineLost):  # the first rank ends when it is done
            follow(model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reports.put(report | {"peak_bytes": peak * 1024, "before_bytes": before * 1024})


def run(num_ranks: int, form: str, asked: tuple[Any, ...]) -> list[dict[str, Any]]:
    """The reports of one model's processes, by rank."""
    address = f"127.0.0.1:{free_port()}"
    reports = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(rank, (num_ranks, address, form, asked, reports), nprocs=num_ranks)  # type: ignore[attr-defined]
    return sorted((reports.get() for _ in range(num_ranks)), key=lambda report: report["rank"])


def compared(form: str, num_ranks: int, asked: tuple[Any, ...]) -> dict[str, Any]:
    [one], ranks = run(1, form, asked), run(num_ranks, form, asked)
    pairs = list(zip(one["drafts"], ranks[0]["drafts"], strict=True))
    agree = [next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0])) for pair in pairs]
    return {
        "format": form,
        "drafts": len(pairs),
        "identical_drafts": sum(a == b for a, b in pairs),
        "tokens_before_the_first_difference": agree,
        "weight_mib": round(one["weight_bytes"] / 2**20, 1),
        "weight_mib_per_rank": [round(each["weight_bytes"] / 2**20, 1) for each in ranks],
        "weights_per_rank": round(ranks[0]["weight_bytes"] / one["weight_bytes"], 3),
        "peak_mib": round(one["peak_bytes"] / 2**20),
        "peak_mib_per_rank": [round(each["peak_bytes"] / 2**20) for each in ranks],
        "before_loading_mib": round(max(each["before_bytes"] for each in (one, *ranks)) / 2**20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=450)
    parser.add_argument("--draft-tokens", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=6)
    options = parser.parse_args()
    tokenizer = load_tokenizer(MODEL)
    prompts = [question.prompt.tokens for question in questions(tokenizer, options.prompt_tokens)][: options.prompts]
    rows = [compared(form, options.ranks, (prompts, options.draft_tokens)) for form in FORMATS]
    print(f"{'weights':10}{'same drafts':>12}{'MiB of weights, each rank':>30}{'peak MiB, each rank':>26}{'before':>8}")
    for row in rows:
        weights, peaks = (f"{row[f'{what}_mib']} | {max(row[f'{what}_mib_per_rank'])}" for what in ("weight", "peak"))
        same = f"{row['identical_drafts']} of {row['drafts']}"
        print(f"{row['format']:10}{same:>12}{weights:>30}{peaks:>26}{row['before_loading_mib']:>8}")
    write("ranks", {"ranks": options.ranks, "draft_tokens": options.draft_tokens, "rows": rows})


if __name__ == "__main__":
    main()
