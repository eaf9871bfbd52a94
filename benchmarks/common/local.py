"""One request on this process's engines, timed; the decode and serving benchmarks share it."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
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
from rapid.weights import embedded_models

MODEL = "smollm2-135m-instruct"


def config(
    dtype: str = "auto",
    quantization: str = "int4",
    *,
    target: str = MODEL,
    threads: int | None = None,
    max_sequences: int = 8,
) -> AppConfig:
    """The settings of serve_config.yaml, with the ``target`` in ``dtype``."""
    engine = {"threads": threads, "max_sequences": max_sequences}
    return parse_config(
        {
            "target": {"model": target, "dtype": dtype, **engine},
            "drafter": {"model": MODEL, "quantization": quantization, "kv_dtype": "int8", **engine},
            "retriever": {"options": {"chunk_tokens": 256}},
        }
    )


@contextmanager
def with_window(num_tokens: int) -> Iterator[str]:
    """The model, in a folder of its own whose positions are scaled (YaRN) if its window is below ``num_tokens``."""
    own = Path(embedded_models.resolve(MODEL))
    settings = json.loads((own / "config.json").read_text(encoding="utf-8"))
    window = settings["max_position_embeddings"]
    if num_tokens <= window:
        yield MODEL
        return
    settings["max_position_embeddings"] = num_tokens
    settings["rope_parameters"] |= {
        "rope_type": "yarn",
        "factor": num_tokens / window,
        "original_max_position_embeddings": window,
    }
    with tempfile.TemporaryDirectory() as folder:
        for file in own.iterdir():
            (Path(folder) / file.name).symlink_to(file)
        (Path(folder) / "config.json").unlink()
        (Path(folder) / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        yield folder


@dataclass(frozen=True)
class Run:
    """``first_s``: until the first token. ``decode_s``: from the first token to the last."""

    first_s: float
    decode_s: float
    statistics: Statistics
    tokens: list[int]

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
    return await timed(
        backend,
        GenerationRequest(
            prompt=prompt,
            sampling=SamplingParams(temperature=temperature),
            speculation=SpeculationParams(**how),
            retrieval=settings.retriever.options,
            max_tokens=new_tokens,
            datastore=datastore,
        ),
    )


async def timed(backend: LocalBackend, request: GenerationRequest) -> Run:
    """Writes ``request``'s completion."""
    started = time.perf_counter()
    first, tokens = None, list[int]()
    async for event in generate(request, backend):
        first = first or time.perf_counter()
        if isinstance(event, Finish):
            ended = time.perf_counter()
            if event.statistics.answers:
                choosing = sum(event.statistics.timings_ms[part] for part in ("drafting", "verification")) / 1e3
                first = ended - choosing
            return Run((first or ended) - started, ended - (first or ended), event.statistics, tokens)
        tokens += event.tokens
    raise AssertionError("a completion ends with Finish")
