"""The Prometheus metrics of requests and engines. Ray exports them on every node's metrics port, as `ray_rapid_…`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ray.serve.metrics import Counter, Gauge, Histogram

from deployments.observability.metrics import COUNTERS, GAUGES, HISTOGRAMS
from deployments.serve.scrape import ClusterMetrics

if TYPE_CHECKING:
    from rapid.engine.messages import EngineStats


class RayExporter:
    """`deployments.observability.metrics.MetricsExporter` with Ray's metrics."""

    def __init__(self) -> None:
        self._counters = {
            name: Counter(f"rapid_{name}", words, tag_keys=tuple(labels)) for name, (words, labels) in COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(f"rapid_{name}", words, boundaries=buckets, tag_keys=tuple(labels))
            for name, (words, labels, buckets) in HISTOGRAMS.items()
        }
        self._gauges = {name: Gauge(f"rapid_{name}", words) for name, words in GAUGES.items()}
        self.text = ClusterMetrics().text

    def increment(self, name: str, amount: float, labels: Mapping[str, str]) -> None:
        self._counters[name].inc(amount, dict(labels))

    def observe(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self._histograms[name].observe(value, dict(labels))

    def set(self, name: str, value: float) -> None:
        self._gauges[name].set(value)


class QueueMetrics:
    """Requests that wait for a place on an engine. They wait here: Serve gives a replica no more than it has places."""

    def __init__(self, roles: Iterable[str]) -> None:
        self._waiting = Gauge("rapid_num_requests_waiting", "Waiting for a place on an engine", tag_keys=("role",))
        self._numbers = dict.fromkeys(roles, 0)
        for role in self._numbers:
            self._add(role, 0)

    @contextmanager
    def waiting(self, role: str) -> Iterator[None]:
        """Counts one more request until the block ends."""
        self._add(role, 1)
        try:
            yield
        finally:
            self._add(role, -1)

    def _add(self, role: str, number: int) -> None:
        self._numbers[role] += number
        self._waiting.set(self._numbers[role], {"role": role})


class EngineMetrics:
    """The memory, sequences and passes of this replica's engine; Serve adds the labels `deployment` and `replica`."""

    def __init__(self) -> None:
        self._kv = Gauge("rapid_kv_bytes", "KV memory: used by open sequences, cached, total", tag_keys=("state",))
        self._sequences = Gauge("rapid_leases", "Open sequences")
        self._waiting = Gauge("rapid_num_requests_waiting_for_kv", "Sequences that wait for room in the KV memory")
        self._pass_age = Gauge("rapid_pass_age_seconds", "How long the current forward pass has been running")
        self._counters = {
            "prefix_cache_hit_tokens": Counter("rapid_prefix_cache_hit_tokens", "Prompt tokens found in the KV memory"),
            "prefix_cache_miss_tokens": Counter("rapid_prefix_cache_miss_tokens", "Prompt tokens that were not there"),
            "kv_evicted_pages": Counter("rapid_kv_evicted_pages", "Pages of the KV memory given to others"),
            "forward_passes": Counter("rapid_forward_passes", "Forward passes of the model"),
            "forward_pass_tokens": Counter("rapid_forward_pass_tokens", "Tokens computed by them"),
            "passes_out_of_memory": Counter(
                "rapid_passes_out_of_memory", "Passes that had to be cut for lack of memory"
            ),
            "host_waits": Counter("rapid_host_waits", "How often the engine waited for its device to read results"),
        }
        self._seen: dict[str, int] = dict.fromkeys(self._counters, 0)

    def update(self, stats: EngineStats) -> None:
        kv = stats.kv
        for state, size in (("used", kv.bytes_used), ("cached", kv.bytes_cached), ("total", kv.bytes_total)):
            self._kv.set(size, {"state": state})
        self._sequences.set(stats.num_sequences)
        self._waiting.set(stats.num_waiting)
        self._pass_age.set(stats.pulse.pass_age_s)
        totals = {
            "prefix_cache_hit_tokens": kv.hit_tokens,
            "prefix_cache_miss_tokens": kv.miss_tokens,
            "kv_evicted_pages": kv.evicted_pages,
            "forward_passes": stats.forward_passes,
            "forward_pass_tokens": stats.tokens_processed,
            "passes_out_of_memory": stats.out_of_memory,
            "host_waits": stats.host_waits,
        }
        for name, total in totals.items():
            if total > self._seen[name]:
                self._counters[name].inc(total - self._seen[name])
        self._seen = totals
