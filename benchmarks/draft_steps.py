"""A draft step behind a short prompt over a plain round behind a long one: what a drafted token costs.

Both are measured in the engines that a request uses, sampling and penalties included, in turns. The drafter's prompt
and the target's are the beginning of the same document. A draft step is one of the steps behind the first, which also
reads what the target has written. "sampled" is T 0.7; "penalised" has top-p 0.9 and a repetition penalty of 1.1, too.
With one thread its CPU time is measured, also on a machine that does other things.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import rapid  # noqa: F401 (before torch)

# isort: split
from benchmarks.common.local import MODEL, config
from benchmarks.common.results import write
from benchmarks.common.work import documents
from deployments.builders import build_engine
from rapid.engine.engine import Engine
from rapid.engine.messages import DraftRequest, SequenceRequest, VerifyRequest
from rapid.engine.propose import propose
from rapid.engine.sequence import Sequence
from rapid.engine.torch_thread import compute
from rapid.engine.verify import prefill, verify_draft
from rapid.models.draft_vocabulary import Size, by_frequency
from rapid.sampling.params import LogitParams, SamplingParams
from rapid.speculation.draft import Draft, DraftLimits
from rapid.speculation.params import SpeculationParams
from rapid.text.tokenizer import load_tokenizer

DRAFTED = 5
HOW: dict[str, tuple[SamplingParams, LogitParams | None]] = {
    "greedy": (SamplingParams(temperature=0), None),
    "sampled": (SamplingParams(temperature=0.7), None),
    "penalised": (
        SamplingParams(temperature=0.7, top_p=0.9),
        LogitParams(repetition_penalty=1.1),
    ),
}


def opened(engine: Engine, tokens: list[int], how: str, known: list[int], size: Size, *, reads: bool) -> Sequence:
    sampling, logits = HOW[how]
    adjusted = logits.on(known, engine.model.info) if logits is not None else None
    request = SequenceRequest(
        tokens,
        600,
        sampling,
        SpeculationParams(draft_vocabulary=size),
        logits=adjusted,
        known=by_frequency(known),
    )
    sequence = engine.open(request).result()
    if reads:
        engine.submit(prefill(sequence)).result()
    else:
        for part in (*sequence.cache.pool.keys, *sequence.cache.pool.values):
            part.normal_()
        sequence.cache.advance(len(tokens) - 1)
    return sequence


def plain(engine: Engine, sequence: Sequence) -> None:
    engine.submit(verify_draft(sequence, VerifyRequest(Draft(sequence.position)))).result()


def draft(engine: Engine, sequence: Sequence, written: list[int], num_tokens: int) -> None:
    """A draft that is thrown away: another begins where it began."""
    asked, model = DraftRequest(0, written, DraftLimits(num_tokens)), engine.model
    engine.submit(propose(sequence, asked, model.info.eos_token_ids, model.draft_head)).result()


class Watch:
    """Milliseconds of calls: of the clock on the wall, or, with one thread, of that thread's CPU."""

    def __init__(self, threads: int) -> None:
        self._one_thread = threads == 1

    def _now(self) -> float:
        return compute(time.thread_time) if self._one_thread else time.perf_counter()

    def ms(self, call: Callable[..., None], *arguments: Any) -> float:
        started = self._now()
        call(*arguments)
        return (self._now() - started) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=7000)
    parser.add_argument("--draft-prompt-tokens", type=int, default=1000)
    parser.add_argument("--cases", nargs="+", choices=tuple(HOW), default=list(HOW))
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="1: CPU time")
    parser.add_argument("--unread", action="store_true", help="the long prompt's keys and values are noise")
    options = parser.parse_args()
    tokens = load_tokenizer(MODEL)(documents()[0].text()[:60_000]).input_ids
    long, short = tokens[: options.prompt_tokens], tokens[: options.draft_prompt_tokens]
    settings, watch = config(threads=options.threads), Watch(options.threads)
    engines = build_engine(settings.target), build_engine(settings.drafter)
    rows: list[dict[str, Any]] = []
    sizes: tuple[Size, ...] = ("auto", "full")
    for how in options.cases:
        target = opened(engines[0], long, how, long, "auto", reads=not options.unread)
        drafters = {size: opened(engines[1], short, how, long, size, reads=True) for size in sizes}
        took: dict[str, list[float]] = {"plain": [], "auto": [], "full": []}
        for _ in range(options.repeats + 2):
            took["plain"].append(watch.ms(plain, engines[0], target))
            for size, drafter in drafters.items():
                one, several = (watch.ms(draft, engines[1], drafter, target.output[:], n) for n in (1, DRAFTED))
                took[str(size)].append((several - one) / (DRAFTED - 1))
        medians = {name: round(statistics.median(times[2:]), 2) for name, times in took.items()}
        ratios = {f"{size} over plain": round(medians[str(size)] / medians["plain"], 3) for size in sizes}
        least = {f"least {name}": round(min(times[2:]), 2) for name, times in took.items()}
        rows.append({"sampling": how, **{f"{name} ms": ms for name, ms in medians.items()}, **ratios, **least})
        print(f"  {rows[-1]}", flush=True)
        for engine, sequence in ((engines[0], target), *((engines[1], drafter) for drafter in drafters.values())):
            engine.close(sequence)
    for engine in engines:
        engine.shutdown()
    names = ("prompt_tokens", "draft_prompt_tokens", "repeats", "threads", "unread")
    write("draft_steps", {name: getattr(options, name) for name in names} | {"rows": rows})


if __name__ == "__main__":
    main()
