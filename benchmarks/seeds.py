"""A request with a seed writes the same text alone, as one of four choices, and beside seven other requests.

Every text is sampled at temperature 0.7 by the embedded model on this process's engines.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import replace
from typing import Any

import rapid  # noqa: F401 (before torch)

# isort: split
from benchmarks.common.local import MODEL, config
from benchmarks.common.results import write
from deployments.builders import local_backend
from rapid.backend.local import LocalBackend
from rapid.events import Delta
from rapid.generate import generate, generate_choices
from rapid.request import GenerationRequest
from rapid.sampling.params import SamplingParams
from rapid.speculation.params import SpeculationParams
from rapid.text.prompts import Message, read_chat
from rapid.text.tokenizer import load_tokenizer

CHOICES, OTHERS = 4, 7
QUESTIONS = (
    "Write a short story about a lighthouse keeper.",
    "What is a good name for a grey cat, and why?",
    "How do I make bread?",
    "Describe the sea.",
    "Why is the sky blue?",
    "Tell me about the city of Lisbon.",
    "Write a poem about rain.",
    "What should one pack for a week in the mountains?",
)


def _with_seed(request: GenerationRequest, seed: int | None) -> GenerationRequest:
    return replace(request, sampling=replace(request.sampling, seed=seed))


async def text(request: GenerationRequest, backend: LocalBackend) -> list[int]:
    return [token async for event in generate(request, backend) if isinstance(event, Delta) for token in event.tokens]


async def choices(request: GenerationRequest, backend: LocalBackend) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in range(CHOICES)]
    async for event in generate_choices(request, CHOICES, backend):
        if isinstance(event, Delta):
            texts[event.choice] += event.tokens
    return texts


async def compare(backend: LocalBackend, strategy: str, num_seeds: int, num_tokens: int) -> dict[str, Any]:
    """How many of the seeds write their own text again in each company."""
    tokenizer = load_tokenizer(MODEL)
    mine, *others = [
        GenerationRequest(
            prompt=read_chat([Message("user", question)], tokenizer),
            sampling=SamplingParams(temperature=0.7),
            speculation=SpeculationParams(strategy=strategy),
            max_tokens=num_tokens,
            ignore_eos=True,
        )
        for question in QUESTIONS
    ]
    assert len(others) == OTHERS
    alone = [await text(_with_seed(mine, seed), backend) for seed in range(num_seeds)]
    chosen = [
        each
        for first in range(0, num_seeds, CHOICES)
        for each in await choices(_with_seed(mine, first), backend)  # choice i has the seed plus i
    ]
    beside = []
    for seed in range(num_seeds):
        written, *_ = await asyncio.gather(*(text(each, backend) for each in (_with_seed(mine, seed), *others)))
        beside.append(written)
    return {
        "strategy": strategy,
        "seeds": num_seeds,
        "tokens": num_tokens,
        "different_texts": len({tuple(tokens) for tokens in alone}),
        "same_as_choice_of_4": sum(map(list.__eq__, alone, chosen)),
        "same_beside_7_others": sum(map(list.__eq__, alone, beside)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--strategies", nargs="+", default=["autoregressive"])
    options = parser.parse_args()
    rows = []
    for dtype in options.dtypes:
        with local_backend(config(dtype=dtype)) as backend:
            for strategy in options.strategies:
                row = asyncio.run(compare(backend, strategy, options.seeds, options.tokens))
                rows.append({"dtype": dtype} | row)
                print(f"  {rows[-1]}", flush=True)
    write("seeds", {"temperature": 0.7, "rows": rows})


if __name__ == "__main__":
    main()
