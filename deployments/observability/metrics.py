"""The Prometheus metrics of requests and engines. Ray exports them on every node's metrics port, as `ray_rapid_…`.

Names are vLLM's where it has one. Labels take few values, and none that a client chooses. Ray rebuilds a histogram's
sum from the middles of its buckets, so what is to be exact is a counter: seconds too.
"""

import time
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from ray.serve.metrics import Counter, Gauge, Histogram

from rapid.engine.engine import EngineStats
from rapid.events import Delta, Finish, Statistics

_SECONDS = [10.0**power * step for power in range(-3, 3) for step in (1, 2, 5)]  # 1 ms to 500 s
_SCORES = [step / 20 for step in range(1, 21)]
_LAST_POSITION = 15  # of a draft's tokens; what lies behind counts as this one
_FLUSH_S = 1.0  # a call of Ray's takes as long as all that a round counts

_STRATEGY = ("strategy",)
_COUNTERS: dict[str, tuple[str, Sequence[str]]] = {
    "requests": ("HTTP requests answered; status 499: the client left before the end", ("endpoint", "status")),
    "prompt_tokens": ("Tokens of the prompts of finished answers", _STRATEGY),
    "prompt_tokens_cached": ("Those of them that the target had in its KV memory", _STRATEGY),
    "generation_tokens": ("Tokens written", _STRATEGY),
    "rounds": ("Target forward passes, by what drafted and how many tokens", ("strategy", "source", "gamma")),
    "round_seconds": ("Seconds of the rounds: draft, verify, and transport, which is the rest", ("strategy", "part")),
    "spec_decode_num_draft_tokens": ("Draft tokens verified", ("strategy", "source")),
    "spec_decode_num_accepted_tokens": ("Draft tokens that stood", ("strategy", "source")),
    "spec_decode_num_draft_tokens_per_pos": ("Draft tokens verified, by position in the draft", ("position",)),
    "spec_decode_num_accepted_tokens_per_pos": ("Draft tokens that stood, by position in the draft", ("position",)),
    "fallbacks": ("Answers that ended without a drafter though their strategy has one", ("reason",)),
    "engines_lost": ("Engines that were lost under a running answer", ("role",)),
}
_HISTOGRAMS: dict[str, tuple[str, Sequence[str], list[float]]] = {
    "time_to_first_token_seconds": ("From the request to its first tokens", _STRATEGY, _SECONDS),
    "time_per_output_token_seconds": ("Seconds a token after the first ones, of finished answers", _STRATEGY, _SECONDS),
    "request_duration_seconds": ("From the request to the end of its answer", ("endpoint",), _SECONDS),
    "request_queue_seconds": ("Waiting for a place on a target", (), _SECONDS),
    "prefill_seconds": ("Reading the prompt", ("role",), _SECONDS),
    "retrieval_seconds": ("Retrieving: chunk, embed, store, search", (), _SECONDS),
    "retrieval_score": ("Cosine similarity to the query of each chunk that was kept", (), _SCORES),
}


class RequestMetrics:
    """What the requests of this process did. Counted in Python, and handed to Ray about once a second."""

    def __init__(self) -> None:
        self._counters = {
            name: Counter(f"rapid_{name}", words, tag_keys=tuple(labels)) for name, (words, labels) in _COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(f"rapid_{name}", words, boundaries=buckets, tag_keys=tuple(labels))
            for name, (words, labels, buckets) in _HISTOGRAMS.items()
        }
        self._running = Gauge("rapid_num_requests_running", "HTTP requests that are being answered")
        self._num_running = 0
        self._tally: Tally[tuple[str, ...]] = Tally()
        self._flushed = time.monotonic()

    def began(self) -> None:
        self._num_running += 1
        self._running.set(self._num_running)

    def ended(self, endpoint: str, status: int, seconds: float) -> None:
        self._num_running -= 1
        self._running.set(self._num_running)
        self._observe("request_duration_seconds", seconds, endpoint)
        self._count("requests", 1, endpoint, str(status))
        self._flush()

    def first_tokens(self, strategy: str, seconds: float) -> None:
        self._observe("time_to_first_token_seconds", seconds, strategy)

    def round(self, strategy: str, delta: Delta) -> None:
        """One round."""
        drafted, accepted = delta.num_drafted, min(delta.num_accepted, len(delta.tokens))
        self._count("generation_tokens", len(delta.tokens), strategy)
        self._count("rounds", 1, strategy, delta.source, str(drafted))
        rest_ms = max(0.0, delta.elapsed_ms - delta.draft_ms - delta.verify_ms)
        for part, ms in (("draft", delta.draft_ms), ("verify", delta.verify_ms), ("transport", rest_ms)):
            self._count("round_seconds", ms / 1e3, strategy, part)
        if drafted:
            self._count("spec_decode_num_draft_tokens", drafted, strategy, delta.source)
            self._count("spec_decode_num_accepted_tokens", accepted, strategy, delta.source)
            for i in range(drafted):
                self._count("spec_decode_num_draft_tokens_per_pos", 1, str(min(i, _LAST_POSITION)))
            for i in range(accepted):
                self._count("spec_decode_num_accepted_tokens_per_pos", 1, str(min(i, _LAST_POSITION)))
        if time.monotonic() - self._flushed > _FLUSH_S:
            self._flush()

    def read(self, stats: Statistics) -> None:
        """The prompt of an answer, however many choices it has."""
        self._count("prompt_tokens", stats.prompt_tokens, stats.strategy)
        self._count("prompt_tokens_cached", stats.cached_tokens, stats.strategy)

    def finished(self, finish: Finish, seconds_per_token: float | None) -> None:
        """The end of one choice; ``seconds_per_token`` where there are tokens after the first ones."""
        stats = finish.statistics
        seconds = {name: ms / 1e3 for name, ms in stats.timings_ms.items()}
        if seconds_per_token is not None:
            self._observe("time_per_output_token_seconds", seconds_per_token, stats.strategy)
        self._observe("request_queue_seconds", seconds["queueing"])
        self._observe("prefill_seconds", seconds["target_prefill"], "target")
        if stats.draft_prompt_tokens:
            self._observe("prefill_seconds", seconds["draft_prefill"], "drafter")
        if seconds["retrieval"]:
            self._observe("retrieval_seconds", seconds["retrieval"])
        for chunk in stats.chunks:
            self._observe("retrieval_score", chunk["score"])
        if stats.fallback:
            self._count("fallbacks", 1, stats.fallback)
        self._count("engines_lost", stats.resumed, "target")
        self._count("engines_lost", stats.drafters_lost, "drafter")

    def _count(self, name: str, amount: float, *labels: str) -> None:
        self._tally[(name, *labels)] += amount

    def _observe(self, name: str, value: float, *labels: str) -> None:
        self._histograms[name].observe(value, dict(zip(_HISTOGRAMS[name][1], labels, strict=True)))

    def _flush(self) -> None:
        tally, self._tally, self._flushed = self._tally, Tally(), time.monotonic()
        for (name, *labels), amount in tally.items():
            if amount > 0:  # Ray refuses 0
                self._counters[name].inc(amount, dict(zip(_COUNTERS[name][1], labels, strict=True)))


class QueueMetrics:
    """Who waits for a place on an engine, counted where they wait: Serve hands a replica no more than it has places."""

    def __init__(self, roles: Iterable[str]) -> None:
        self._waiting = Gauge("rapid_num_requests_waiting", "Waiting for a place on an engine", tag_keys=("role",))
        self._numbers = dict.fromkeys(roles, 0)
        for role in self._numbers:
            self._add(role, 0)

    @contextmanager
    def waiting(self, role: str) -> Iterator[None]:
        """Counts one more until the block ends."""
        self._add(role, 1)
        try:
            yield
        finally:
            self._add(role, -1)

    def _add(self, role: str, number: int) -> None:
        self._numbers[role] += number
        self._waiting.set(self._numbers[role], {"role": role})


class EngineMetrics:
    """What the engine of this replica holds and has done; Serve adds the labels `deployment` and `replica`."""

    def __init__(self) -> None:
        self._kv = Gauge("rapid_kv_bytes", "KV memory: used by open sequences, cached, total", tag_keys=("state",))
        self._sequences = Gauge("rapid_leases", "Open sequences")
        self._waiting = Gauge("rapid_num_requests_waiting_for_kv", "Sequences that wait for room in the KV memory")
        self._counters = {
            "prefix_cache_hit_tokens": Counter("rapid_prefix_cache_hit_tokens", "Prompt tokens found in the KV memory"),
            "prefix_cache_miss_tokens": Counter("rapid_prefix_cache_miss_tokens", "Prompt tokens that were not there"),
            "kv_evicted_pages": Counter("rapid_kv_evicted_pages", "Pages of the KV memory given to others"),
            "forward_passes": Counter("rapid_forward_passes", "Forward passes of the model"),
            "forward_pass_tokens": Counter("rapid_forward_pass_tokens", "Tokens computed by them"),
        }
        self._seen: dict[str, int] = dict.fromkeys(self._counters, 0)

    def update(self, stats: EngineStats) -> None:
        kv = stats.kv
        for state, size in (("used", kv.bytes_used), ("cached", kv.bytes_cached), ("total", kv.bytes_total)):
            self._kv.set(size, {"state": state})
        self._sequences.set(stats.num_sequences)
        self._waiting.set(stats.num_waiting)
        totals = {
            "prefix_cache_hit_tokens": kv.hit_tokens,
            "prefix_cache_miss_tokens": kv.miss_tokens,
            "kv_evicted_pages": kv.evicted_pages,
            "forward_passes": stats.forward_passes,
            "forward_pass_tokens": stats.tokens_processed,
        }
        for name, total in totals.items():
            if total > self._seen[name]:
                self._counters[name].inc(total - self._seen[name])
        self._seen = totals
