"""A sequence of tokens in an engine, and how a task asks the engine to extend it."""

from __future__ import annotations

import time
from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from rapid.kernels.interface import Tokens
from rapid.kv_cache.pool import KVCache
from rapid.sampling.logits_processor import LogitParams, LogitProcessor
from rapid.sampling.sampler import SamplingParams
from rapid.speculation.draft import Draft

T = TypeVar("T")


@dataclass(frozen=True)
class SequenceRequest:
    """What a sequence is opened with: room for ``prompt`` and ``max_new_tokens``, and how it samples.

    The last ``written`` tokens of the prompt are output already, of a sequence elsewhere that this one goes on from.
    One that may not wait for room gets it at once or not at all. With ``num_logprobs`` each token that is written comes
    with its log-probability, and those of that many most likely ones.
    """

    prompt: list[int]
    max_new_tokens: int
    sampling: SamplingParams
    written: int = 0
    may_wait: bool = True
    logits: LogitParams | None = None
    num_logprobs: int | None = None

    @property
    def capacity(self) -> int:
        return len(self.prompt) + self.max_new_tokens

    def after(self, output: list[int]) -> SequenceRequest:
        """The same where ``output`` has been written since. What random numbers led to it do not come again."""
        sampling = self.sampling
        if sampling.seed is not None and output:
            sampling = replace(sampling, seed=hash((sampling.seed, len(output))) & (2**63 - 1))
        return replace(
            self,
            prompt=self.prompt + output,
            max_new_tokens=self.max_new_tokens - len(output),
            sampling=sampling,
            written=self.written + len(output),
        )


@dataclass(eq=False)
class Sequence:
    """One request's tokens in one engine: a prompt, an output, and the cache of their first ``cache.length`` tokens.

    The last ``written`` tokens of the prompt are output too, of a sequence elsewhere that this one goes on from.
    ``ended`` is done once the sequence is closed, by its owner or for being idle.
    """

    id: int
    cache: KVCache
    sampling: SamplingParams
    generator: torch.Generator
    prompt: list[int]
    written: int = 0
    logits: LogitProcessor | None = None
    num_logprobs: int | None = None
    output: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    ended: Future[None] = field(default_factory=lambda: _uncancellable())
    ahead: Draft | None = None  # what is being drafted behind the output
    drafting_ahead: Future[Any] | None = None  # of the latest `propose`; cancelling it ends that
    last_used: float = field(default_factory=time.monotonic)

    @property
    def position(self) -> int:
        """How many tokens of output there are, here and elsewhere."""
        return self.written + len(self.output)

    def emitted(self, position: int) -> list[int]:
        """The output before ``position``, here and elsewhere."""
        start = len(self.prompt) - self.written
        return (self.prompt[start:] + self.output)[:position]

    def pending(self) -> list[int]:
        """The tokens that are not in the cache yet."""
        cached = self.cache.length - len(self.prompt)
        return self.prompt[self.cache.length :] + self.output[max(0, cached) :]

    def rebase(self, offset: int, tokens: list[int], num_kept: int = 0) -> None:
        """Makes ``tokens`` the output from ``offset`` on, and rolls the cache back to where that still agrees.

        ``num_kept`` tokens of the output stay behind them, which only makes sense where all of ``tokens`` agree.
        The last token is never left in the cache, even if it agrees: feeding it is what gives the next logits.

        Raises:
            ValueError: the output ends before ``offset``, or what this sequence did not write is to change.
        """
        start = offset - self.written
        if not 0 <= start <= len(self.output):
            raise ValueError(f"tokens for output position {offset} met a sequence at {self.position}")
        agree = start
        for ours, theirs in zip(self.output[start:], tokens, strict=False):
            if ours != theirs:
                break
            agree += 1
        end = start + len(tokens)
        self.output[start:] = tokens + self.output[end : end + num_kept]
        self.cache.truncate(len(self.prompt) + min(agree + num_kept, len(self.output) - 1))


def _uncancellable() -> Future[None]:
    """A future that one waiter's cancellation does not cancel for the others."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future


class ForwardRequest(NamedTuple):
    """A task's request: append ``tokens`` to ``sequence``; send back the logits of the last ``num_rows`` of them.

    ``tokens`` None asks for a prefill: all of the prompt but its last token, as much of it as no other sequence has
    computed meanwhile.
    """

    sequence: Sequence
    tokens: Tokens | None
    num_rows: int


class EarlyResult(NamedTuple):
    """A task's result before its end. What it does from there on, nobody waits for, and cancelling ``rest`` ends."""

    result: object
    rest: Future[object]


Task = Generator[ForwardRequest | EarlyResult, Tensor | None, T]


def ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
