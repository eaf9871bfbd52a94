"""Admission to an engine: which sequences are open, and which requests wait for room, in order of arrival."""

from __future__ import annotations

import itertools
import logging
import math
import secrets
import time
from collections import deque
from collections.abc import Set
from concurrent.futures import Future
from typing import NamedTuple

from rapid.engine.messages import SequenceRequest
from rapid.engine.sequence import Sequence
from rapid.errors import InvalidRequest, Overloaded, SequenceClosed
from rapid.kv_cache.pool import KVCache, KVPool
from rapid.sampling.logits_processor import LogitProcessor

logger = logging.getLogger(__name__)

_CLAIM_WITHIN_S = 10.0  # from its opening a sequence is known to who opened it, or to nobody


class _Arrival(NamedTuple):
    request: SequenceRequest
    logits: LogitProcessor | None
    future: Future[Sequence]


class Admission:
    """The open sequences of model ``name`` in ``pool``, and up to ``max_queued`` requests that wait for room.

    A request is admitted when the pool has room for all tokens that its sequence can need. A sequence that is not used
    for ``idle_timeout`` seconds, or not for the first time within ten, is closed: the request that opened it is gone.
    Not thread-safe: the engine calls every method with its lock held.
    """

    def __init__(self, pool: KVPool, name: str, *, max_queued: int, idle_timeout: float) -> None:
        self.kv = pool.stats()  # as of the last `update`; later passes have changed the pool
        self._pool, self._name = pool, name
        self._max_queued, self._idle_timeout = max_queued, idle_timeout
        self._ids = itertools.count(1)
        self._sequences: dict[int, Sequence] = {}
        self._arrivals: deque[_Arrival] = deque()
        self._closing: list[Sequence] = []

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    @property
    def num_waiting(self) -> int:
        return len(self._arrivals)

    @property
    def num_closing(self) -> int:
        """How many closed sequences still hold pages."""
        return len(self._closing)

    def num_decoding(self, since: float) -> int:
        """How many open sequences had a pass after ``since`` that was no prefill."""
        return sum(sequence.decoded_at > since for sequence in self._sequences.values())

    def pause_left_s(self, longest_s: float, first_s: float) -> float:
        """How long until all sequences that pause between two calls may have made the next, or not for ``longest_s``.

        The first call may take ``first_s`` from the opening. Sequences that usually pause for longer do not count: they
        wait for a drafter, or for their reader.
        """
        pausing = [s for s in self._sequences.values() if not s.num_asked and s.pause_s <= longest_s]
        until = (s.answered_at + (longest_s if s.has_called else first_s) for s in pausing)
        return max(until, default=-math.inf) - time.monotonic()

    def arrive(self, request: SequenceRequest, logits: LogitProcessor | None) -> Future[Sequence]:
        """A future of the sequence, which a later `update` admits; ``logits`` adjusts the sequence's logits.

        The future fails with `Overloaded` when there is no room and the request may not wait, or too many requests
        wait. Cancelling the future ends the wait.

        Raises:
            InvalidRequest: the sequence needs more than the whole pool.
        """
        if self._pool.pages_for(request.capacity) > self._pool.num_pages:
            needed = request.capacity * self._pool.layout.bytes_per_token
            total = self._pool.num_pages * self._pool.page_bytes
            raise InvalidRequest(
                f"{request.capacity} tokens need {needed / 2**20:.0f} MiB of KV memory, and {self._name} has "
                f"{total / 2**20:.0f} MiB in all: shorten the request or raise kv_memory_gib",
                code="kv_memory_exceeded",
            )
        self._arrivals.append(_Arrival(request, logits, Future()))
        return self._arrivals[-1].future

    def get(self, sequence_id: int) -> Sequence:
        """The open sequence of that id; the call counts as a use.

        Raises:
            SequenceClosed: the sequence was closed, or expired.
        """
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            raise SequenceClosed(f"sequence {sequence_id} is closed: the request was cancelled or idle for too long")
        sequence.last_used = time.monotonic()
        return sequence

    def leave(self, sequence: Sequence) -> None:
        """Closes ``sequence``. A later `update` releases its pages, once no task works on it."""
        if self._sequences.pop(sequence.id, None):
            self._closing.append(sequence)
            sequence.ended.set_result(None)

    def update(self, busy: Set[int]) -> None:
        """Closes idle sequences, releases the pages of closed ones, and admits requests that now have room.

        ``busy`` holds the ids of sequences that a task works on, or waits to work on.
        """
        self._expire(busy)
        for sequence in [s for s in self._closing if s.id not in busy]:
            self._pool.insert(sequence.cache, sequence.prompt + sequence.output, sequence.cache.length)
            self._pool.close(sequence.cache)
            self._closing.remove(sequence)
        arrivals, self._arrivals = self._arrivals, deque()
        for arrival in arrivals:
            request, _, future = arrival
            if future.cancelled():
                continue
            cache = self._pool.open(request.prompt, request.capacity, request.salt) if not self._arrivals else None
            if cache is not None:
                self._admit(arrival, cache)
            elif request.may_wait and len(self._arrivals) < self._max_queued:
                self._arrivals.append(arrival)
            elif future.set_running_or_notify_cancel():
                waiting = f"no KV memory is free now, and {len(self._arrivals)} requests wait for it"
                future.set_exception(Overloaded(f"{self._name}: {waiting}", status=429 if request.may_wait else 503))
        self.kv = self._pool.stats()

    def refuse(self, error: Exception) -> None:
        """Fails every request that waits."""
        for _, _, future in self._arrivals:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        self._arrivals.clear()

    def _admit(self, arrival: _Arrival, cache: KVCache) -> None:
        request, logits, future = arrival
        seed = request.sampling.seed
        if seed is None:
            seed = secrets.randbits(64) - 2**63
        sequence = Sequence(next(self._ids), request, cache, seed, logits, cached_tokens=cache.length)
        if not future.set_running_or_notify_cancel():
            self._pool.close(cache)
            return
        self._sequences[sequence.id] = sequence
        future.set_result(sequence)

    def _expire(self, busy: Set[int]) -> None:
        now = time.monotonic()
        for sequence in [s for s in self._sequences.values() if s.id not in busy]:
            if sequence.last_used is None:
                unused_s, limit_s = now - sequence.answered_at, min(_CLAIM_WITHIN_S, self._idle_timeout)
            else:
                unused_s, limit_s = now - sequence.last_used, self._idle_timeout
            if unused_s > limit_s:
                logger.warning("closing sequence %d: unused for %.0f s", sequence.id, unused_s)
                self.leave(sequence)
