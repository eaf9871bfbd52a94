"""A sequence of tokens in an engine, and how a task asks the engine to extend it."""

from __future__ import annotations

import time
from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from rapid.attention import Tokens
from rapid.kv_cache import KVCache
from rapid.sampling import SamplingParams

T = TypeVar("T")


@dataclass(eq=False)
class Sequence:
    """One request's tokens in one engine: a prompt, an output, and the cache of their first ``cache.length`` tokens.

    ``ended`` is done once the sequence is closed, by its owner or for being idle.
    """

    id: int
    cache: KVCache
    sampling: SamplingParams
    generator: torch.Generator
    prompt: list[int]
    output: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    ended: Future[None] = field(default_factory=lambda: _uncancellable())
    last_used: float = field(default_factory=time.monotonic)

    def pending(self) -> list[int]:
        """The tokens that are not in the cache yet."""
        cached = self.cache.length - len(self.prompt)
        return self.prompt[self.cache.length :] + self.output[max(0, cached) :]

    def rebase(self, offset: int, tokens: list[int]) -> None:
        """Makes ``tokens`` the output from ``offset`` on, and rolls the cache back to where that still agrees.

        The last token is never left in the cache, even if it agrees: feeding it is what gives the next logits.
        """
        agree = offset
        for ours, theirs in zip(self.output[offset:], tokens, strict=False):
            if ours != theirs:
                break
            agree += 1
        self.output[offset:] = tokens
        self.cache.truncate(len(self.prompt) + min(agree, len(self.output) - 1))


def _uncancellable() -> Future[None]:
    """A future that one waiter's cancellation does not cancel for the others."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future


class Extend(NamedTuple):
    """A task's request: append ``tokens`` to ``sequence``; send back the logits of the last ``num_rows`` of them.

    ``tokens`` None asks for a prefill: all of the prompt but its last token, as much of it as no other sequence has
    computed meanwhile.
    """

    sequence: Sequence
    tokens: Tokens | None
    num_rows: int


Task = Generator[Extend, Tensor | None, T]
