"""What requests count. An exporter publishes the numbers; Ray's is in `deployments.serve.metrics`.

Names are vLLM's where it has one. Labels take few values, and none that a client chooses. Ray rebuilds a histogram's
sum from the middles of its buckets, so a sum that is to be exact is a counter, seconds too.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol

from rapid.events import Delta, Finish, Statistics

EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"  # Prometheus' name of the form of `MetricsExporter.text`
_SECONDS = [10.0**power * step for power in range(-3, 3) for step in (1, 2, 5)]  # 1 ms to 500 s
_SCORES = [step / 20 for step in range(1, 21)]
_LAST_POSITION = 15  # of a draft's tokens; every later one counts as this one
_FLUSH_S = 1.0  # one call of the exporter takes as long as all that a round counts

_STRATEGY = ("strategy",)
COUNTERS: dict[str, tuple[str, Sequence[str]]] = {
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
    "transfer_positions": ("Tokens whose transfer strength was chosen for them", _STRATEGY),
    "transfer_nats": ("KL of what they were drawn from to the target's own distribution", _STRATEGY),
    "fallbacks": ("Answers that ended without a drafter though their strategy has one", ("reason",)),
    "engines_lost": ("Engines that were lost under a running answer", ("role",)),
}
HISTOGRAMS: dict[str, tuple[str, Sequence[str], list[float]]] = {
    "time_to_first_token_seconds": ("From the request to its first tokens", _STRATEGY, _SECONDS),
    "time_per_output_token_seconds": ("Seconds a token after the first ones, of finished answers", _STRATEGY, _SECONDS),
    "request_duration_seconds": ("From the request to the end of its answer", ("endpoint",), _SECONDS),
    "request_queue_seconds": ("Waiting for a place on a target", (), _SECONDS),
    "prefill_seconds": ("Reading the prompt", ("role",), _SECONDS),
    "retrieval_seconds": ("Retrieving: chunk, embed, store, search", (), _SECONDS),
    "answer_score": ("Score of each answer that speculative_rag drafted", (), _SCORES),
    "retrieval_score": ("Score of each chunk that was kept: its cosine similarity to the query", (), _SCORES),
    "retrieval_confidence": ("How probably what was retrieved holds what the query needs", (), _SCORES),
}
GAUGES = {"num_requests_running": "HTTP requests that are being answered"}


class MetricsExporter(Protocol):
    """Publishes metrics, each by its name in `COUNTERS`, `HISTOGRAMS` or `GAUGES`."""

    def increment(self, name: str, amount: float, labels: Mapping[str, str]) -> None: ...
    def observe(self, name: str, value: float, labels: Mapping[str, str]) -> None: ...
    def set(self, name: str, value: float) -> None: ...
    async def text(self) -> str:
        """What was published, by all processes, as Prometheus reads it."""
        ...


class NoExporter:
    """Publishes nothing: for an API outside a cluster."""

    def increment(self, name: str, amount: float, labels: Mapping[str, str]) -> None: ...
    def observe(self, name: str, value: float, labels: Mapping[str, str]) -> None: ...
    def set(self, name: str, value: float) -> None: ...
    async def text(self) -> str:
        return ""


class RequestMetrics:
    """What the requests of this process did. Counters reach the exporter about once a second."""

    def __init__(self, exporter: MetricsExporter) -> None:
        self._exporter = exporter
        self._num_running = 0
        self._counted: defaultdict[tuple[str, ...], float] = defaultdict(float)
        self._flushed = time.monotonic()

    def began(self) -> None:
        self._num_running += 1
        self._exporter.set("num_requests_running", self._num_running)

    def ended(self, endpoint: str, status: int, seconds: float) -> None:
        self._num_running -= 1
        self._exporter.set("num_requests_running", self._num_running)
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
        if stats.confidence is not None:
            self._observe("retrieval_confidence", stats.confidence)
        for chunk in stats.chunks:
            self._observe("retrieval_score", chunk["score"])
        for answer in stats.answers:
            self._observe("answer_score", answer["score"])
        self._count("transfer_positions", stats.transfer.positions, stats.strategy)
        self._count("transfer_nats", stats.transfer.positions * stats.transfer.divergence, stats.strategy)
        if stats.fallback:
            self._count("fallbacks", 1, stats.fallback)
        self._count("engines_lost", stats.resumed, "target")
        self._count("engines_lost", stats.drafters_lost, "drafter")

    def _count(self, name: str, amount: float, *labels: str) -> None:
        self._counted[(name, *labels)] += amount

    def _observe(self, name: str, value: float, *labels: str) -> None:
        self._exporter.observe(name, value, dict(zip(HISTOGRAMS[name][1], labels, strict=True)))

    def _flush(self) -> None:
        counted, self._counted, self._flushed = self._counted, defaultdict(float), time.monotonic()
        for (name, *labels), amount in counted.items():
            if amount > 0:  # Ray refuses 0
                self._exporter.increment(name, amount, dict(zip(COUNTERS[name][1], labels, strict=True)))
