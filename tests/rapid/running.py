"""How the tests drive models and engines."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rapid.engine.engine import Engine
from rapid.engine.messages import DraftRequest, SequenceRequest, VerifyRequest
from rapid.engine.propose import propose
from rapid.engine.sequence import Sequence, Task
from rapid.engine.verify import prefill, verify_draft
from rapid.kernels.interface import Batch, BatchEntry
from rapid.kv_cache.pool import KVCache
from rapid.models.model import Model
from rapid.sampling.params import SamplingParams
from rapid.speculation.draft import Draft, DraftLimits, VerifyResult
from rapid.speculation.params import SpeculationParams

GREEDY = SamplingParams(temperature=0)
VOCAB = 32
# A pass over another number of tokens rounds float32 differently: here by up to 2.4e-6.
ROUNDING = {"rtol": 0, "atol": 2e-5}


def random_tokens(length: int, seed: int) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def new_cache(model: Model, capacity: int) -> KVCache:
    """A cache in a pool of its own."""
    cache = model.new_pool((capacity + 256) * model.layout.bytes_per_token).open([], capacity)
    assert cache is not None
    return cache


def logits_after(model: Model, tokens: list[int]) -> Tensor:
    """[V], from one pass over all of ``tokens``."""
    return model.forward([BatchEntry(new_cache(model, len(tokens)), tokens, 1)])[0][0]


def attended(batch: Batch, query: Tensor, key: Tensor, value: Tensor, scaling: float, layer: int = 0) -> Tensor:
    """What ``batch`` gives for queries and keys that are not rotated."""
    heads = torch.cat((query, key, value), 1)
    return batch.attend(layer, heads, (torch.ones_like(heads[:, 0]), torch.zeros_like(heads[:, 0])), scaling)


def contents(cache: KVCache) -> tuple[Tensor, Tensor]:
    """Copies of the keys and values that are filled, in order: [layers, KV heads, length, head size]."""
    slots = [slot for first, last in cache.runs(cache.length) for slot in range(first, last)]
    keys, values = (torch.stack([rows[:, slots] for rows in side]) for side in (cache.pool.keys, cache.pool.values))
    return keys, values


def assert_cache_is_fresh(sequence: Sequence, model: Model) -> None:
    """What is cached equals a prefill of the same tokens in one pass."""
    length = sequence.cache.length
    fresh = new_cache(model, length)
    model.forward([BatchEntry(fresh, (sequence.prompt + sequence.output)[:length], 0)])
    for ours, expected in zip(contents(sequence.cache), contents(fresh), strict=True):
        torch.testing.assert_close(ours, expected, **ROUNDING)


def done(future: Future[Any]) -> Any:
    return future.result(timeout=30)


def eventually(condition: Callable[[], bool]) -> None:
    """Waits until ``condition`` holds; fails after 10 seconds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.002)


def begun(engine: Engine, prompt: list[int], sampling: SamplingParams = GREEDY, room: int = 100) -> Sequence:
    """A new sequence with room for ``room`` new tokens, whose prompt is still to be read."""
    sequence: Sequence = done(engine.open(SequenceRequest(prompt, room, sampling)))
    return sequence


def opened(engine: Engine, prompt: list[int], sampling: SamplingParams = GREEDY, room: int = 100) -> Sequence:
    """A new sequence whose prompt is read."""
    sequence = begun(engine, prompt, sampling, room)
    done(engine.submit(prefill(sequence)))
    return sequence


def decode(engine: Engine, sequence: Sequence, num_tokens: int) -> list[int]:
    """Plain decoding, a token a round."""
    for _ in range(num_tokens):
        done(engine.submit(verification(sequence, Draft(len(sequence.output)))))
    return sequence.output


def verification(
    sequence: Sequence, draft: Draft, rule: str = "lossless", transfer_strength: float = 0.0
) -> Task[VerifyResult]:
    """Verifies ``draft`` as if the sequence had been opened with this rule and η."""
    params = SpeculationParams(verification=rule, transfer_strength=transfer_strength)
    sequence.request = replace(sequence.request, speculation=params)
    return verify_draft(sequence, VerifyRequest(draft, transfers=True))


def proposal(
    sequence: Sequence, offset: int, tokens: list[int], limits: DraftLimits, draft_top_k: int, eos: frozenset[int]
) -> Task[Draft]:
    """Drafts as if the sequence had been opened with this ``draft_top_k``."""
    sequence.request = replace(sequence.request, speculation=SpeculationParams(draft_top_k=draft_top_k))
    return propose(sequence, DraftRequest(offset, tokens, limits), eos)
