"""A sequence of tokens in an engine, and what a task may yield to the engine."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

from rapid.engine.messages import SequenceRequest
from rapid.engine.readout import Drawing, Readout
from rapid.kernels.interface import QueryWatcher, Tokens
from rapid.kv_cache.pool import KVCache
from rapid.kv_cache.table import PageTable
from rapid.models.draft_head import DraftHead
from rapid.sampling.logits_processor import LogitProcessor
from rapid.speculation.draft import Draft

T = TypeVar("T")


class SharedPass(NamedTuple):
    """How many sequences decoded in a pass, and their tokens in all."""

    num_sequences: int
    num_tokens: int


ALONE = SharedPass(1, 1)


_NEWEST = 0.5  # the weight of the newest pause


@dataclass(eq=False)
class Sequence:
    """One request's tokens in one engine: a prompt, an output, and the cache of their first ``cache.length`` tokens.

    ``ended`` is done once the sequence is closed: by the request that opened it, or because it was idle.
    """

    id: int
    request: SequenceRequest
    cache: KVCache
    seed: int  # of its random numbers
    logits: LogitProcessor | None = None
    head: DraftHead | None = None  # of a sequence that drafts from a draft vocabulary
    output: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    ended: Future[None] = field(default_factory=lambda: _uncancellable())
    ahead: Draft | None = None  # the tokens drafted ahead, behind the output
    drafting_ahead: Future[Any] | None = None  # of the latest `propose`; cancelling it stops it
    ranking: list[int] | None = None  # the pages of its prompt by their worth to drafts over a view (`page_ranking`)
    over_view: tuple[int, list[int]] = (-1, [])  # (position, draft tokens behind it that passes over a view have read)
    last_used: float | None = None  # by a call or a pass
    decoded_at: float = -math.inf  # when the last pass ended that was no prefill
    num_asked: int = 0  # calls not answered yet
    answered_at: float = field(default_factory=lambda: time.monotonic())  # the latest of them, or the opening
    has_called: bool = False  # for anything but its opening
    pause_s: float = 0.0  # from an answer to the next call, lately
    shared: SharedPass = ALONE  # that pass

    @property
    def prompt(self) -> list[int]:
        return self.request.prompt

    def asks(self) -> None:
        """A call comes."""
        self.last_used = time.monotonic()
        if self.has_called and not self.num_asked:
            self.pause_s += _NEWEST * (self.last_used - self.answered_at - self.pause_s)
        self.has_called = True
        self.num_asked += 1

    def is_answered(self) -> None:
        """A call has its answer."""
        self.answered_at = time.monotonic()
        self.num_asked -= 1

    @property
    def device(self) -> torch.device:
        """Where its logits are."""
        return self.cache.pool.layout.device

    @property
    def written(self) -> int:
        """How many tokens at the prompt's end are output that another engine wrote."""
        return self.request.written

    @property
    def position(self) -> int:
        """The number of output tokens, those of other engines included."""
        return self.written + len(self.output)

    def emitted(self, position: int) -> list[int]:
        """The output before ``position``, that of other engines included."""
        start = len(self.prompt) - self.written
        return (self.prompt[start:] + self.output)[:position]

    def pending(self) -> list[int]:
        """The tokens that are not in the cache yet."""
        cached = self.cache.length - len(self.prompt)
        return self.prompt[self.cache.length :] + self.output[max(0, cached) :]

    def rebase(self, offset: int, tokens: list[int], num_kept: int = 0) -> None:
        """Makes ``tokens`` the output from ``offset`` on, and rolls the cache back to the last token that agrees.

        ``num_kept`` tokens of the output stay behind ``tokens``; this requires that all of ``tokens`` agree. The last
        token never stays in the cache, even if it agrees: the next pass must read it to give the next logits.

        Raises:
            ValueError: the output ends before ``offset``, or ``offset`` lies before this sequence's own output.
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
    """A future that several callers wait for; the cancellation of one wait does not cancel it for the others."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future


class ForwardRequest(NamedTuple):
    """A task's request for the next pass: append ``tokens`` to ``sequence``; the answer is the last rows' logits.

    These are [``num_rows``, V], on the device. With ``drawing`` (and one row) the answer is what is `Drawn` from them:
    a token, or more if the engine has a graph that goes on from token to token.

    ``tokens`` None asks for a prefill: all of the prompt but its last token, except pages that another sequence
    computes in the meantime.

    With a ``view`` (`KVCache.view`, `KVCache.again`) the pass reads these pages, and the sequence's cache stays as long
    as it is. ``watch`` is called with the queries of the tokens, layer by layer.
    """

    sequence: Sequence
    tokens: Tokens | None
    num_rows: int
    view: PageTable | None = None
    watch: QueryWatcher | None = None
    drawing: Drawing | None = None

    @property
    def table(self) -> PageTable:
        """The pages that the pass reads."""
        return self.view or self.sequence.cache


class EarlyResult(NamedTuple):
    """A task's result before the task ends. The task continues in the background; cancelling ``rest`` ends it."""

    result: object
    rest: Future[object]


# A task's first request is a ForwardRequest. What it is sent depends on what it yielded.
Task = Generator[ForwardRequest | Readout | EarlyResult, Any, T]
