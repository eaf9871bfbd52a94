"""What sampling costs on one CPU thread, and how often a little noise in the logits changes what is drawn.

Each cost is the thread's CPU time, the median of many calls, beside that of a reference whose calls take turns with
them (`benchmarks.common.sorted_sampling`). The logits are normal with a standard deviation of 5, where a nucleus has
dozens of tokens, as a language model's mostly has, or of 2.5, where it has hundreds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import rapid  # noqa: F401 (before torch)

# isort: split
import torch
from torch import Tensor

from benchmarks.common import sorted_sampling as reference
from benchmarks.common.results import write
from rapid.engine.compiled_drafts import TokenDrawer
from rapid.engine.readout import Drawing
from rapid.sampling.logits_processor import LogitProcessor
from rapid.sampling.noise import Noise, Purpose, uniform
from rapid.sampling.params import LogitParams, SamplingParams
from rapid.sampling.row_params import RowParams
from rapid.sampling.sampler import first_to_come, probabilities, sample, warp_to_few

STEPS: dict[str, SamplingParams] = {
    "temperature": SamplingParams(temperature=0.7),
    "temperature, top_k 50": SamplingParams(temperature=0.7, top_k=50),
    "temperature, top_p 0.9": SamplingParams(temperature=0.7, top_p=0.9),
    "temperature, min_p 0.05": SamplingParams(temperature=0.7, min_p=0.05),
    "temperature, top_k, top_p, min_p": SamplingParams(temperature=0.7, top_k=50, top_p=0.9, min_p=0.05),
}
WRITTEN, PROMPT = 500, 1000  # tokens
PENALTIES = LogitParams(
    logit_bias={100 * i: 0.5 for i in range(20)},
    repetition_penalty=1.1,
    frequency_penalty=0.2,
    presence_penalty=0.1,
    prompt=tuple(range(0, 7 * PROMPT, 7)),
)
Calls = tuple[Callable[[], Any], Callable[[], Any]]


def cost_ms(calls: Calls, num_calls: int) -> dict[str, float]:
    """Medians in milliseconds of the two calls, ours and the reference's, which take turns."""
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(num_calls):
        for call, times in zip(calls, took, strict=True):
            call()  # what the other call left in the caches is not measured
            started = time.thread_time()
            call()
            times.append((time.thread_time() - started) * 1e3)
    ours, theirs = (statistics.median(times) for times in took)
    return {"ms": round(ours, 3), "reference_ms": round(theirs, 3), "speedup": round(theirs / ours, 1)}


def costs(vocab_size: int, num_rows: int, spread: float, num_calls: int) -> list[dict[str, Any]]:
    """Each step alone, and all of them: from logits [rows, V] to the probabilities and to one drawn token."""
    generator = torch.Generator().manual_seed(1)
    logits = spread * torch.randn(num_rows, vocab_size, generator=generator)
    output, draft = torch.randint(7 * PROMPT, (WRITTEN,), generator=generator).tolist(), [5, 6, 7, 8][: num_rows - 1]
    processor = LogitProcessor(PENALTIES, None, vocab_size, torch.device("cpu"))
    noise, step, every = Noise(torch.tensor(1)), torch.tensor([3]), STEPS["temperature, top_k, top_p, min_p"]
    probs, numbers = probabilities(logits, STEPS["temperature"]), torch.Generator()

    def drawn(probs: Tensor) -> Tensor:
        return sample(probs[:1], noise.keys(Purpose.NEXT, step))

    def drawn_by_reference(probs: Tensor) -> Tensor:
        return reference.sample(probs[:1], torch.rand(1, generator=numbers, dtype=torch.float64))

    def warped(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
        """As the engine does it: the few tokens that are kept, or else all probabilities."""
        few = warp_to_few(logits, RowParams.of([params], logits.device))
        return (few[0][:1], few[1][:1]) if few else (torch.arange(vocab_size)[None], probabilities(logits, params)[:1])

    def warp(params: SamplingParams) -> Calls:
        return lambda: warped(logits, params), lambda: reference.probabilities(logits, params)

    def together(params: SamplingParams) -> Calls:
        def ours() -> Tensor:
            ids, probs = warped(processor(logits, output, draft), params)
            return first_to_come(probs, ids, noise.keys(Purpose.NEXT, step)) if ids.shape[1] <= 64 else drawn(probs)

        return (
            ours,
            lambda: drawn_by_reference(
                reference.probabilities(reference.adjusted(PENALTIES, logits, output, draft), params)
            ),
        )

    calls: dict[str, Calls] = {name: warp(params) for name, params in STEPS.items()}
    calls["penalties and bias"] = (
        lambda: processor(logits, output, draft),
        lambda: reference.adjusted(PENALTIES, logits, output, draft),
    )
    calls["drawing one token"] = (lambda: drawn(probs), lambda: drawn_by_reference(probs))
    drawing = Drawing(every, False, 64, 1, 0, 0, num_rows, processor.following([*output, *draft]))
    drawer, rows_of = TokenDrawer(drawing, torch.arange(vocab_size), num_rows), logits.bfloat16()

    def drafted() -> None:
        for step, row in enumerate(rows_of):
            drawer.kernel.alone(*drawer.arguments(step, row))

    calls["everything, of a draft's token: one kernel"] = drafted, together(every)[1]
    calls["temperature, top_p, penalties, bias, drawing"] = together(STEPS["temperature, top_p 0.9"])
    calls["everything"] = together(every)
    rows = []
    for name, call in calls.items():
        rows.append({"step": name, "vocab": vocab_size, "rows": num_rows, "spread": spread, **cost_ms(call, num_calls)})
        print(f"  {rows[-1]}", flush=True)
    return rows


def changed_draws(spread: float, noise_size: float, num_draws: int, vocab_size: int = 49_152) -> dict[str, Any]:
    """The share of draws that normal noise in all logits turns into another token."""
    generator, ours, theirs = torch.Generator().manual_seed(2), 0, 0
    for draw in range(num_draws):
        logits = spread * torch.randn(vocab_size, generator=generator)
        noisy = logits + noise_size * torch.randn(vocab_size, generator=generator)
        probs = torch.stack([logits, noisy]).softmax(-1)
        key = Noise(torch.tensor(draw)).keys(Purpose.NEXT, torch.zeros(1, dtype=torch.long)).expand(2)
        ours += int(sample(probs, key).diff().abs() > 0)
        theirs += int(reference.sample(probs, uniform(key)).diff().abs() > 0)
    row = {"spread": spread, "noise": noise_size, "draws": num_draws}
    row |= {"changed": round(ours / num_draws, 4), "changed_by_inversion": round(theirs / num_draws, 4)}
    print(f"  {row}", flush=True)
    return row


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=25)
    parser.add_argument("--draws", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured = [
        row
        for vocab_size in (49_152, 128_256)
        for num_rows in (1, 5)
        for spread in (5.0, 2.5)
        for row in costs(vocab_size, num_rows, spread, options.calls)
    ]
    changed = [changed_draws(spread, size, options.draws) for spread in (5.0, 2.5) for size in (0.02, 1e-4)]
    write("sampling", {"costs": measured, "changed_draws": changed})


if __name__ == "__main__":
    main()
