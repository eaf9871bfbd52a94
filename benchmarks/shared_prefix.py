"""Eight questions about one document at once: its keys and values read once for all of them, or once for each.

The decode loop runs in this process over two engines. Both sides answer in turns on the same engines; only the target's
attention backend differs. Speed is the sum of the answers' tokens per second, from the first token to the last. In
float32 the texts of both sides are compared. A single question is timed in the same way. What is retrieved is kept, so
that no question's retrieval takes time from another's decoding.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import Any

import rapid  # noqa: F401 (before torch)

# isort: split
from benchmarks.common.local import MODEL, config
from benchmarks.common.questions import PASSAGES
from benchmarks.common.results import DATA, write
from deployments.builders import build_engine, build_retriever
from rapid.backend.local import LocalBackend, Retrieve
from rapid.backend.protocol import Retrieval
from rapid.engine.torch_thread import compute
from rapid.events import Delta, Finish
from rapid.generate import generate
from rapid.kernels.cpu.attention import RunAttention
from rapid.models.model import Model
from rapid.request import GenerationRequest
from rapid.sampling.params import SamplingParams
from rapid.speculation.params import SpeculationParams
from rapid.text.prompts import Message, Prompt, read_chat
from rapid.text.tokenizer import load_tokenizer
from retrieval.retriever import Retriever

DOCUMENT = "Pride and Prejudice"
QUESTIONS = (
    "Who are the Bingleys, and what do the others think of them?",
    "Quote the most important sentences about Mr. Darcy in this passage.",
    "What does Elizabeth say here? Quote her words.",
    "Where does this passage take place?",
    "Who is Jane, and what happens to her?",
    "Summarize this passage in one paragraph.",
    "What does Mrs. Bennet want, and why?",
    "Which letters are written or read in this passage?",
)
SIDES = {"shared": RunAttention(), "alone": RunAttention(share_prefixes=False)}
CASES = ((len(QUESTIONS), "autoregressive"), (len(QUESTIONS), "rapid"), (1, "autoregressive"))


def prompts(num_tokens: int) -> list[Prompt]:
    tokenizer = load_tokenizer(MODEL)
    name, start = PASSAGES[DOCUMENT]
    text = (DATA / name).read_text(encoding="utf-8")[start:][: 8 * num_tokens]
    passage = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids[:num_tokens])
    return [read_chat([Message("user", f"{passage}\n\n{question}")], tokenizer) for question in QUESTIONS]


class KeptRetrieval:
    """A retriever that computes each question's passages once."""

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever
        self._kept: dict[str, Retrieval] = {}

    def __call__(self, contents: list[str], query: str, options: Any) -> Retrieval:
        if query not in self._kept:
            self._kept[query] = self._retriever.retrieve(contents, query, options)
        return self._kept[query]


class Asker:
    """Asks some of the questions at once, on either side."""

    def __init__(self, dtype: str, retrieve: Retrieve) -> None:
        self.settings = config(dtype)
        self.target, self.drafter = build_engine(self.settings.target), build_engine(self.settings.drafter)
        self.model: Model = self.target.model
        self._backend = LocalBackend(self.target, self.drafter, retrieve)

    async def _answer(self, prompt: Prompt, strategy: str, num_tokens: int) -> tuple[float, list[int]]:
        request = GenerationRequest(
            prompt=prompt,
            sampling=SamplingParams(temperature=0),
            speculation=SpeculationParams(strategy=strategy),
            retrieval=self.settings.retriever.options,
            max_tokens=num_tokens,
            ignore_eos=True,
        )
        tokens: list[int] = []
        first = ended = 0.0
        async for event in generate(request, self._backend):
            if isinstance(event, Delta):
                first = first or time.perf_counter()
                tokens += event.tokens
            elif isinstance(event, Finish):
                ended = time.perf_counter()
        return (len(tokens) - 1) / (ended - first), tokens

    def ask(self, asked: list[Prompt], side: str, strategy: str, num_tokens: int) -> tuple[float, list[list[int]]]:
        """The sum of the answers' tokens per second, and their tokens."""

        async def together() -> list[tuple[float, list[int]]]:
            return await asyncio.gather(*(self._answer(prompt, strategy, num_tokens) for prompt in asked))

        self.model.attention = SIDES[side]
        answers = asyncio.run(together())
        return sum(speed for speed, _ in answers), [tokens for _, tokens in answers]

    def close(self) -> None:
        for engine in (self.target, self.drafter):
            engine.shutdown()


def compare(asker: Asker, asked: list[Prompt], strategy: str, num_tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of both sides, in turns, and how many texts are the same."""
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    texts: dict[str, list[list[int]]] = {}
    asker.ask(asked, "shared", strategy, 4)  # reads the prompts
    for i in range(repeats):
        for side in list(SIDES)[:: 1 if i % 2 else -1]:
            speed, texts[side] = asker.ask(asked, side, strategy, num_tokens)
            speeds[side].append(round(speed, 1))
    row = {
        "questions": len(asked),
        "strategy": strategy,
        **{f"{side}_tokens_per_s": statistics.median(speeds[side]) for side in SIDES},
        "median_ratio": round(statistics.median(a / b for a, b in zip(*speeds.values(), strict=True)), 3),
        "same_texts": sum(a == b for a, b in zip(*texts.values(), strict=True)),
    }
    print(row, flush=True)
    return row | {"tokens_per_s": speeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=6950)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    options = parser.parse_args()
    asked = prompts(options.prompt_tokens)
    settings = config()
    retriever = compute(build_retriever, settings.retriever, settings.files, MODEL)
    retrieve = KeptRetrieval(retriever)
    rows = []
    for dtype in options.dtypes:
        asker = Asker(dtype, retrieve)
        for count, strategy in CASES:
            row = compare(asker, asked[:count], strategy, options.new_tokens, options.repeats)
            rows.append({"dtype": dtype} | row)
        asker.close()
    write("shared_prefix", {"prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens, "rows": rows})


if __name__ == "__main__":
    main()
