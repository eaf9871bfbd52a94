"""What a round costs beside the models' passes, in this checkout and an earlier one on the same machine.

The engine is real, and its model gives prepared logits at once. So a round's time is that of its coordination: handing
tasks over, sampling, verifying, reading. Sequences of one batch are submitted together. Each checkout has a process of
its own, and they take turns, case by case; a case's time is the median over all its rounds.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common.checkouts import HERE, Checkout
from benchmarks.common.results import write

SAMPLING: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.7},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
}
# Runs in both checkouts.
WORKER = """
import json, sys, time
import rapid
import torch
from rapid.engine.engine import Engine
from rapid.engine.messages import DraftRequest, SequenceRequest, VerifyRequest
from rapid.engine.propose import propose
from rapid.engine.verify import verify_draft
from rapid.kernels.cpu.attention import RunAttention
from rapid.kv_cache.pool import KVLayout
from rapid.models.info import ModelInfo
from rapid.sampling.params import SamplingParams
from rapid.speculation.draft import Draft, DraftLimits
from rapid.speculation.params import SpeculationParams

class Prepared:
    tokenizer, balanced_context = None, 4096.0
    layout = KVLayout(num_kv_heads=1, head_dim=4, dtype=torch.float32, devices=(torch.device("cpu"),))

    def __init__(self, vocab_size, bias):
        generator = torch.Generator().manual_seed(1)
        self.vocab_size = vocab_size
        logits = torch.randn(256, vocab_size, generator=generator)
        self.logits = 5 * (logits + bias * torch.randn(256, vocab_size, generator=generator))
        self.info = ModelInfo("prepared", 4096, vocab_size, frozenset(), "float32", "none", "cpu", "none", 0, 1)

    def new_pool(self, budget):
        return RunAttention().pool(self.layout, budget)

    def record(self, *_):
        pass

    def compiled_steps(self):
        pass

    @torch.inference_mode()
    def forward(self, entries, **_):
        for cache, tokens, _ in entries:
            cache.advance(len(tokens))
        sizes = [rows for _, _, rows in entries]
        first = entries[0].cache.length % 128
        return list(self.logits[first : first + sum(sizes)].split(sizes))

target, drafter = (Engine(Prepared(int(sys.argv[1]), bias), kv_bytes=2**22) for bias in (0.0, 0.3))
print("ready", flush=True)
for line in sys.stdin:
    work, count, gamma, sampling, rounds = json.loads(line)
    def opened(engine, i):
        speculation = SpeculationParams(strategy="rapid")
        params = SamplingParams(seed=i, **sampling)
        return engine.open(SequenceRequest([5], 3000, params, speculation)).result()
    far, near = ([opened(engine, i) for i in range(count)] for engine in (target, drafter))
    known = [0] * count
    took = []
    for _ in range(rounds):
        started = time.perf_counter()
        drafts = [Draft(s.position) for s in far]
        if gamma:
            requests = [DraftRequest(n, s.output[n:], DraftLimits(gamma)) for n, s in zip(known, far)]
            drafting = [drafter.submit(propose(s, r, frozenset())) for s, r in zip(near, requests)]
            drafts = [future.result() for future in drafting]
            known = [s.position for s in far]
        if work == "verify":
            started = time.perf_counter()
        elif work == "draft":
            took.append((time.perf_counter() - started) * 1e3)
        verifying = [target.submit(verify_draft(s, VerifyRequest(d, transfers=True))) for s, d in zip(far, drafts)]
        [future.result() for future in verifying]
        if work != "draft":
            took.append((time.perf_counter() - started) * 1e3)
    for engine, sequences in ((target, far), (drafter, near)):
        for sequence in sequences:
            engine.close(sequence)
    print(json.dumps(took[2:]), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("against", type=Path, help="the earlier checkout (a git worktree)")
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    workers = {
        "now": Checkout(HERE, WORKER, options.vocabulary),
        "before": Checkout(options.against.resolve(), WORKER, options.vocabulary),
    }
    rows: list[dict[str, Any]] = []
    for name, sampling in SAMPLING.items():
        for work, gamma in (("plain", 0), ("draft", 4), ("verify", 4)):
            for count in (1, 8):
                took: dict[str, list[float]] = {side: [] for side in workers}
                for repeat in range(options.repeats):
                    for side in list(workers) if repeat % 2 else list(workers)[::-1]:
                        took[side] += workers[side].ask(work, count, gamma, sampling, options.rounds)
                now, before = (round(statistics.median(took[side]), 3) for side in ("now", "before"))
                row = {"sampling": name, "work": work, "draft_tokens": gamma, "sequences": count}
                rows.append(row | {"ms": now, "before_ms": before, "speedup": round(before / now, 2)})
                print(rows[-1], flush=True)
    for worker in workers.values():
        worker.end()
    write("readout", {"vocabulary": options.vocabulary, "rows": rows})


if __name__ == "__main__":
    main()
