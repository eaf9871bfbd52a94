"""One request on this process's engines, timed; the decode and serving benchmarks share it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from deployments.config import AppConfig, parse_config
from rapid.backend.local import LocalBackend
from rapid.datastore.search import Datastore
from rapid.events import Finish, Statistics
from rapid.generate import generate
from rapid.request import GenerationRequest
from rapid.sampling.params import SamplingParams
from rapid.speculation.params import SpeculationParams
from rapid.text.prompts import Prompt

MODEL = "smollm2-135m-instruct"


def config(dtype: str = "auto", quantization: str = "int4") -> AppConfig:
    """The settings of serve_config.yaml, with the target in ``dtype``."""
    return parse_config(
        {
            "target": {"model": MODEL, "dtype": dtype},
            "drafter": {"model": MODEL, "quantization": quantization},
            "retriever": {"options": {"chunk_tokens": 256}},
        }
    )


@dataclass(frozen=True)
class Run:
    """``first_s``: until the first token. ``decode_s``: from the first token to the last."""

    first_s: float
    decode_s: float
    statistics: Statistics

    @property
    def tokens_per_second(self) -> float:
        return (self.statistics.emitted - 1) / self.decode_s if self.decode_s else 0.0


async def run(
    backend: LocalBackend,
    settings: AppConfig,
    prompt: Prompt,
    temperature: float,
    new_tokens: int,
    *,
    datastore: Datastore | None = None,
    **how: Any,
) -> Run:
    """Writes ``new_tokens`` (or fewer, if the model ends) with the options in ``how``.

    Of an answer that is chosen among drafts, decoding is drafting and scoring: it comes whole.
    """
    request = GenerationRequest(
        prompt=prompt,
        sampling=SamplingParams(temperature=temperature),
        speculation=SpeculationParams(**how),
        retrieval=settings.retriever.options,
        max_tokens=new_tokens,
        datastore=datastore,
    )
    started = time.perf_counter()
    first = None
    async for event in generate(request, backend):
        first = first or time.perf_counter()
        if isinstance(event, Finish):
            ended = time.perf_counter()
            if event.statistics.answers:
                choosing = sum(event.statistics.timings_ms[part] for part in ("drafting", "verification")) / 1e3
                first = ended - choosing
            return Run((first or ended) - started, ended - (first or ended), event.statistics)
    raise AssertionError("a completion ends with Finish")
