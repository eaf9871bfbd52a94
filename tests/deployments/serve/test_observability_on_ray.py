"""Metrics, spans and logs as an operator of the whole application gets them; one cluster for the module."""

from __future__ import annotations

import gzip
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import promql_parser
import pytest
import ray
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from served import (
    JSON_TYPE,
    LETTERS,
    ON_RAY,
    complete,
    engine_of,
    free_port,
    health,
    pieces,
    seconds_until_free,
    served,
)

from rapid.engine.messages import SequenceRequest
from rapid.sampling.params import SamplingParams

pytestmark = ON_RAY

GRAFANA = Path(__file__).parents[3] / "docs" / "grafana"
TRACE = "0af7651916cd43dd8448eb211c80319c"
Sample = tuple[str, frozenset[tuple[str, str]]]  # a name and its labels


class Cluster(NamedTuple):
    url: str
    metrics_url: str
    spans: list[Span]
    before: dict[Sample, float]  # what this process has counted itself, in tests of the API without Ray

    def scrape(self) -> dict[Sample, float]:
        """The samples of every replica, after they have had the time to report."""
        time.sleep(3)  # Ray's processes report once a second here, to an agent that is asked for what it has
        text = httpx.get(self.metrics_url, timeout=30).text
        families = text_string_to_metric_families(text)
        samples = (sample for family in families for sample in family.samples)
        found = {(s.name, frozenset(s.labels.items())): s.value for s in samples}
        return {sample: value - self.before.get(sample, 0.0) for sample, value in found.items()}

    def post(self, **fields: Any) -> httpx.Response:
        headers = {"X-Request-Id": "mine", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        body = {"model": "letters", "prompt": LETTERS, "max_tokens": 8, "temperature": 0} | fields
        return httpx.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[str, list[Span]]]:
    """A double of an OpenTelemetry collector: its URL, and what it was sent."""
    spans: list[Span] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            zipped = self.headers.get("Content-Encoding") == "gzip"
            sent = ExportTraceServiceRequest.FromString(gzip.decompress(body) if zipped else body)
            scopes = [scope for resource in sent.resource_spans for scope in resource.scope_spans]
            spans.extend(span for scope in scopes if scope.scope.name == "rapid" for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", spans
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def cluster(tiny_folder: Path, collector: tuple[str, list[Span]]) -> Iterator[Cluster]:
    engine = {"model": str(tiny_folder), "dtype": "float32", "kv_memory_gib": 0.0003, "threads": 1}  # 2,500 tokens
    options = {"chunk_tokens": 64, "min_tokens": 128, "threshold": -1.0}
    retriever = {"long_content_tokens": 64, "options": options}
    config = {"served_model": "letters", "target": engine, "drafter": engine, "retriever": retriever}
    port = free_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH", "deployments.observability.tracing:otlp")
        environment.setenv("RAY_SERVE_TRACING_SAMPLING_RATIO", "1")
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector[0])
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        ray_options = {"_metrics_export_port": port, "_system_config": {"metrics_report_interval_ms": 1000}}
        with served(config, logging_config={"encoding": "JSON"}, **ray_options) as url:
            fresh = Cluster(url, f"http://127.0.0.1:{port}/metrics", collector[1], {})
            counted = {
                s: n for s, n in fresh.scrape().items() if s[0].endswith(("_total", "_count", "_sum", "_bucket"))
            }
            yield fresh._replace(before=counted)


@pytest.fixture(scope="module")
def answers(cluster: Cluster) -> list[dict[str, Any]]:
    """The `rapid` objects of a few answers, the first things that were asked."""
    strategies: list[dict[str, Any]] = [{"strategy": "lookup"}, {"strategy": "rapid"}]
    for name in ("speculative", "magicdec", "triforce"):
        strategies.append({"strategy": name, "num_draft_tokens": 3, "draft_cache_tokens": 32})
    return [complete(cluster.url, rapid)[1] for rapid in strategies]


def until(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 30
    while not (result := found()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return result


def total(samples: dict[Sample, float], name: str, **labels: str) -> float:
    return sum(value for (n, has), value in samples.items() if n == name and labels.items() <= dict(has).items())


def test_metrics_add_up_to_what_the_answers_say(cluster: Cluster, answers: list[dict[str, Any]]) -> None:
    samples = cluster.scrape()
    for metric, field in {
        "rounds": "rounds",
        "generation_tokens": "emitted",
        "prompt_tokens": "prompt_tokens",
        "spec_decode_num_draft_tokens": "drafted",
        "spec_decode_num_accepted_tokens": "accepted",
    }.items():
        for answer in answers:
            assert total(samples, f"ray_rapid_{metric}_total", strategy=answer["strategy"]) == answer[field]
    for answer in answers:
        assert answer["drafted"] or answer["strategy"] in ("lookup", "rapid")
    drafted = sum(answer["drafted"] for answer in answers)
    assert total(samples, "ray_rapid_spec_decode_num_draft_tokens_per_pos_total") == drafted
    by_gamma = Counter[int]()
    for (name, labels), value in samples.items():
        if name == "ray_rapid_rounds_total":
            by_gamma[int(dict(labels)["gamma"])] += int(value)
    assert sum(gamma * rounds for gamma, rounds in by_gamma.items()) == drafted
    for part, timing in {"draft": "drafting", "verify": "verification", "transport": "transport"}.items():
        seconds = sum(answer["timings_ms"][timing] for answer in answers) / 1e3
        assert total(samples, "ray_rapid_round_seconds_total", part=part) == pytest.approx(seconds, rel=1e-3, abs=1e-4)
    retrievals = sum(1 for answer in answers if answer["timings_ms"]["retrieval"])  # an answer may end before
    for metric, count in {
        "time_to_first_token": len(answers),
        "time_per_output_token": len(answers),
        "retrieval": retrievals,
    }.items():
        assert total(samples, f"ray_rapid_{metric}_seconds_count") == count
    assert total(samples, "ray_rapid_requests_total", endpoint="/v1/completions", status="200") == len(answers)
    assert total(samples, "ray_rapid_kv_bytes", deployment="Target", state="used") == 0
    assert total(samples, "ray_rapid_kv_bytes", deployment="Target", state="total") > 3e5


def test_one_scrape_of_the_api_has_what_the_nodes_export(cluster: Cluster, answers: list[dict[str, Any]]) -> None:
    exported = {sample for sample in cluster.scrape() if sample[0].startswith("ray_rapid_")}
    answer = httpx.get(f"{cluster.url}/metrics", timeout=30)
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(answer.text))
    assert len({family.name for family in families}) == len(families)
    told = {(s.name, frozenset(s.labels.items())) for family in families for s in family.samples}
    assert exported <= told and all(name.startswith(("ray_rapid_", "ray_serve_")) for name, _ in told)
    answered = {"endpoint": "/v1/completions", "status": "200"}.items()
    assert any(name == "ray_rapid_requests_total" and answered <= dict(labels).items() for name, labels in told)


def test_errors_are_counted_by_their_status(cluster: Cluster) -> None:
    assert [cluster.post(max_tokens=-2).status_code, cluster.post(model="other").status_code] == [400, 404]
    assert httpx.get(f"{cluster.url}/nowhere/of-a-clients-own").status_code == 404
    samples = cluster.scrape()
    assert total(samples, "ray_rapid_requests_total", endpoint="/v1/completions", status="400") == 1
    assert total(samples, "ray_rapid_requests_total", endpoint="/v1/completions", status="404") == 1
    assert total(samples, "ray_rapid_requests_total", endpoint="other", status="404") == 1


def test_spans_continue_the_clients_trace(cluster: Cluster) -> None:
    rapid = {"strategy": "speculative", "num_draft_tokens": 3}
    response = cluster.post(rapid=rapid)
    statistics = response.json()["rapid"]

    def of_the_trace() -> list[Span]:
        return [span for span in cluster.spans if span.trace_id.hex() == TRACE]

    until(lambda: any(span.name == "generate" for span in of_the_trace()))
    names = Counter(span.name for span in of_the_trace())
    assert names.items() >= {"generate": 1, "retrieve": 1, "queue": 2, "verify": statistics["rounds"]}.items()
    assert names["draft"] > 0 and names["prefill"] == 2


def test_a_request_is_a_line_of_json_under_its_own_name(cluster: Cluster) -> None:
    answers = [cluster.post(max_tokens=num) for num in (8, 100_000)]
    assert [answer.status_code for answer in answers] == [200, 400]
    assert all(answer.headers.get_list("x-request-id") == ["mine"] for answer in answers)

    def lines() -> list[dict[str, Any]]:
        files = Path(ray._private.worker._global_node.get_logs_dir_path(), "serve").glob("*Ingress*.log")
        text = "\n".join(file.read_text() for file in files)
        assert LETTERS[:15] not in text
        found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        return [line for line in found if line.get("endpoint") and line["request_id"] == "mine"][-2:]

    # A line is written when its answer has gone out, which may be after it was read here.
    finished, refused = until(lambda: (found := lines()) and [line["status"] for line in found] == [200, 400] and found)
    assert (finished["status"], finished["emitted"], finished["levelname"]) == (200, 8, "INFO")
    assert (refused["status"], refused["error"]) == (400, "context_length_exceeded")


def test_two_hundred_who_leave_at_once_hold_nothing_two_seconds_later(cluster: Cluster) -> None:
    fields = {"model": "letters", "prompt": LETTERS, "max_tokens": 1000, "stream": True}
    body = json.dumps(fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{JSON_TYPE}Content-Length: {len(body)}\r\n\r\n"

    def leave(index: int) -> None:
        with socket.create_connection(("127.0.0.1", int(cluster.url.rpartition(":")[2]))) as connection:
            connection.sendall(head.encode() + body)
            if index % 10 == 0:
                connection.recv(1)  # the answer has begun

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(leave, range(200)))
    assert seconds_until_free(cluster.url) < 2.0
    assert cluster.post().status_code == 200  # behind whoever was still on the way
    assert seconds_until_free(cluster.url) < 2.0
    samples = cluster.scrape()
    assert total(samples, "ray_rapid_requests_total", endpoint="/v1/completions", status="499") > 0
    for gauge in ("leases", "num_requests_waiting", "num_requests_waiting_for_kv"):
        assert total(samples, f"ray_rapid_{gauge}") == 0


def test_who_waits_for_a_place_is_counted(cluster: Cluster) -> None:
    """All eight places are leased; who comes then waits in Serve's router, of which an engine knows nothing."""
    target = serve.get_deployment_handle("Target", "rapid").options(stream=True)
    leases = [target.lease.remote(SequenceRequest([2, 3], 1, SamplingParams())) for _ in range(8)]
    for lease in leases:
        next(iter(lease))
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(cluster.post, rapid={"strategy": "autoregressive"}) for _ in range(3)]
        until(lambda: total(cluster.scrape(), "ray_rapid_num_requests_waiting", role="target") == 3)
        for lease in leases:
            lease.cancel()
        assert [answer.result().status_code for answer in waiting] == [200, 200, 200]
    assert total(cluster.scrape(), "ray_rapid_num_requests_waiting") == 0


def selectors(expr: Any, grouped_by: tuple[str, ...] = ()) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """The vector selectors of a query, each with the labels that it is aggregated by."""
    if isinstance(expr, promql_parser.VectorSelector):
        yield expr, grouped_by
    if isinstance(expr, promql_parser.MatrixSelector):
        yield expr.vector_selector, grouped_by
    if isinstance(expr, promql_parser.AggregateExpr):
        grouped_by = tuple(expr.modifier.labels) if expr.modifier else ()
    for name in ("lhs", "rhs", "expr"):
        if hasattr(expr, name):
            yield from selectors(getattr(expr, name), grouped_by)
    for argument in getattr(expr, "args", ()):
        yield from selectors(argument, grouped_by)


def queries() -> Iterator[str]:
    for panel in json.loads((GRAFANA / "rapid.json").read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"].replace("$__rate_interval", "5m")


def alerts() -> Iterator[str]:
    for group in yaml.safe_load((GRAFANA / "alerts.yaml").read_text(encoding="utf-8"))["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


def lose_a_drafter(cluster: Cluster) -> None:
    """Kills it under an answer, and waits for another."""
    answer = pieces(cluster.url, {"strategy": "speculative", "num_draft_tokens": 3}, num_tokens=200)
    next(answer)
    ray.kill(engine_of("Drafter"))
    assert [rapid for _, rapid in answer][-1]["drafters_lost"] == 1
    until(lambda: set(health(cluster.url).get("sequences", ())) == {"target", "drafter"})


def test_the_dashboard_asks_for_what_there_is(cluster: Cluster, answers: list[dict[str, Any]]) -> None:
    """Every selector of every query finds samples that the application exports, with the labels it is grouped by.

    What alerts wait for has not happened, so of those only the names and labels are checked.
    """
    cluster.post(max_tokens=-1)
    for letter in "abcd":  # more than the KV memory has room for
        assert cluster.post(prompt=letter * 1000).status_code == 200
    assert cluster.post(prompt="ab").json()["rapid"]["fallback"] == "no_long_context"
    lose_a_drafter(cluster)
    samples = cluster.scrape()
    asked = [pair for query in queries() for pair in selectors(promql_parser.parse(query))]
    assert len(asked) > 30
    for selector, grouped_by in asked:
        found = [dict(labels) for name, labels in samples if name == selector.name]
        for matcher in selector.matchers.matchers:
            assert matcher.op in (promql_parser.MatchOp.Equal, promql_parser.MatchOp.Re)
            wanted = re.compile(matcher.value if matcher.op == promql_parser.MatchOp.Re else re.escape(matcher.value))
            found = [labels for labels in found if wanted.fullmatch(labels.get(matcher.name, ""))]
        assert found, f"nothing matches {selector}"
        assert all(set(grouped_by) <= labels.keys() for labels in found), f"{selector} is not told by {grouped_by}"
    for selector, grouped_by in (pair for alert in alerts() for pair in selectors(promql_parser.parse(alert))):
        found = [dict(labels) for name, labels in samples if name == selector.name]
        named = {*grouped_by, *(matcher.name for matcher in selector.matchers.matchers)}
        assert found and all(named <= labels.keys() for labels in found), f"no alert can come of {selector}"
