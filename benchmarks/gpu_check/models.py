"""Models of random weights that count: the token behind t is t + 1, with every kernel and at every temperature.

Speeds do not depend on the values of the weights, but acceptance does. The embedding is so large that the layers hardly
move the hidden state, and row t + 1 of the output layer is the embedding of t. So the right text is known beforehand,
a drafter of the same weights drafts it, and a draft token that is replaced by another is rejected: any acceptance can
be had, through the real draft, verification and rollback.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from rapid.engine.engine import Engine
from rapid.engine.lease import LeasedSequence
from rapid.engine.messages import SequenceRequest
from rapid.engine.sequence import Sequence, Task
from rapid.kernels.cuda.attention import PagedAttention, gathered_sdpa
from rapid.models.info import GraphLimits
from rapid.models.model import Model
from rapid.sampling.params import SamplingParams

_EMBEDDING = 64.0  # standard deviation: several times what the layers add up to
_LOGIT = 40.0  # of the right token; the others have about 0
WAIT_S = 300.0


@dataclass(frozen=True)
class Sizes:
    """What is measured: a model's shape, contexts in tokens, numbers of sequences, and rounds of each measurement."""

    shape: dict[str, Any]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    draft_context: int
    rounds: int


REAL = Sizes(
    shape={
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    },
    contexts=(8192, 32768, 120_000),
    batches=(1, 8, 16),
    draft_context=4096,
    rounds=32,
)
PRETENDED = Sizes(
    shape={
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 4096,
    },
    contexts=(300, 700),
    batches=(1, 3),
    draft_context=200,
    rounds=4,
)


def counting_model(sizes: Sizes, device: torch.device, quantization: str = "none") -> Model:
    """A model of ``sizes`` that counts, in bfloat16, made on the device."""
    network: Any = _network(sizes.shape, device)
    with device:
        rows = torch.randn(sizes.shape["vocab_size"], sizes.shape["hidden_size"], dtype=torch.bfloat16)
        network.model.embed_tokens.weight.data = rows * _EMBEDDING
        network.lm_head.weight.data = rows.roll(1, 0) * (_LOGIT / sizes.shape["hidden_size"])
    return _model(network, "counting", quantization)


def ordinary_model(sizes: Sizes, device: torch.device) -> Model:
    """A model of ``sizes`` with weights as they are initialised, whose next token is open."""
    return _model(_network(sizes.shape, device), "ordinary", "none")


def _network(shape: dict[str, Any], device: torch.device) -> PreTrainedModel:
    config = LlamaConfig(**shape, tie_word_embeddings=False, eos_token_id=None, bos_token_id=None)
    with device:
        torch.manual_seed(0)
        network: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return network.eval()


def _model(network: PreTrainedModel, name: str, quantization: str) -> Model:
    # On a CPU the path of a GPU runs with PyTorch's own attention in place of its kernels.
    attention = PagedAttention(gathered_sdpa) if network.device.type == "cpu" else None
    return Model(network, None, name, quantization=quantization, attention=attention)


@contextmanager
def engine(model: Model, num_tokens: int, *, drafts: bool = False) -> Iterator[Engine]:
    """An engine with room for ``num_tokens``, whose pages hold noise of the size of real keys and values."""
    kv_bytes = (num_tokens + 4096) * model.layout.bytes_per_token
    limits = GraphLimits(seconds=14 if drafts else 8)  # the check makes many engines
    running = Engine(model, kv_bytes=kv_bytes, graphs=limits, drafts=drafts)

    def noise() -> Task[None]:
        pool = running._pool
        for rows in (*pool.keys, *pool.values):
            rows.normal_()
        return
        yield

    try:
        running.submit(noise()).result(WAIT_S)
        yield running
    finally:
        running.shutdown()


def open_sequence(
    running: Engine,
    context: int,
    *,
    first: int = 1,
    max_new_tokens: int = 1024,
    sampling: SamplingParams | None = None,
    read: bool = True,
) -> LeasedSequence:
    """A sequence of ``context`` tokens that count from ``first``; with ``read``, as if the target had read them.

    Sequences with the same ``first`` share their pages.
    """
    prompt = [(first + i) % running.model.vocab_size for i in range(context)]
    request = SequenceRequest(prompt, max_new_tokens, sampling or SamplingParams(temperature=0))
    sequence = running.open(request).result(WAIT_S)
    if read:
        running.submit(_as_read(sequence)).result(WAIT_S)
    return LeasedSequence(running, sequence)


def _as_read(sequence: Sequence) -> Task[None]:
    cache = sequence.cache
    cache.advance(len(sequence.prompt) - 1 - cache.length)
    cache.pool.insert(cache, sequence.prompt, cache.length)
    return
    yield


def together(*calls: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Results of ``calls`` that run at the same time."""

    async def run() -> list[Any]:
        return list(await asyncio.wait_for(asyncio.gather(*(call() for call in calls)), WAIT_S))

    return asyncio.run(run())


def median_ms(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median milliseconds of ``step``, after two runs that do not count."""
    times = []
    for i in range(repeats + 2):
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        if i >= 2:
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
