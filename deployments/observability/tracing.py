"""OpenTelemetry spans of what a request does: retrieve, queue, prefill, draft and verify, under one called generate.

Whoever runs the process says where spans go: under Ray Serve by RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH, which may be
`deployments.observability.tracing:otlp`. Serve's own spans then lead from the client's `traceparent` to ours. As long as nobody says,
nothing is recorded, and nothing is in the way of a round.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, Status, StatusCode

from rapid.backend.protocol import Backend, DraftHandle, Lease, Retrieval, Role
from rapid.engine.engine import EngineStats
from rapid.engine.sequence import SequenceRequest
from rapid.errors import RapidError
from rapid.events import Finish
from rapid.models.info import ModelInfo
from rapid.request import GenerationRequest
from rapid.speculation.controller import Costs
from rapid.speculation.draft import Draft, DraftLimits, PrefillResult, VerifyResult

_tracer = trace.get_tracer("rapid")


def otlp() -> list[SpanProcessor]:
    """Sends spans over HTTP to where the standard OTEL_EXPORTER_OTLP_ENDPOINT says."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise RapidError("spans need an exporter: pip install 'rapid-serve[otel]'") from error
    return [BatchSpanProcessor(OTLPSpanExporter())]


class Trace:
    """The span of one request. ``backend`` is what the request is to run on: traced where the span is recorded."""

    def __init__(self, span: Span, backend: Backend) -> None:
        self._span = span
        self.backend = TracedBackend(backend, span) if span.is_recording() else backend

    @classmethod
    @contextmanager
    def start(cls, request: GenerationRequest, backend: Backend) -> "Iterator[Trace]":
        """A span under the one that is current, until the block ends."""
        attributes = {
            "gen_ai.operation.name": "generate_content",
            "gen_ai.request.model": backend.info("target").name,
            "gen_ai.usage.input_tokens": len(request.prompt.tokens),
            "rapid.strategy": request.speculation.strategy,
        }
        with _ending(_tracer.start_span("generate", attributes=attributes)) as span:
            yield cls(span, backend)

    def finish(self, finish: Finish) -> None:
        stats = finish.statistics
        self._span.set_attributes(
            {
                "gen_ai.usage.output_tokens": stats.emitted,
                "gen_ai.response.finish_reasons": [finish.reason],
                "rapid.rounds": stats.rounds,
                "rapid.drafted": stats.drafted,
                "rapid.accepted": stats.accepted,
                "rapid.fallback": stats.fallback or "",
            }
        )


class TracedBackend:
    """Another backend, whose retrievals and leases are spans under ``parent``."""

    def __init__(self, backend: Backend, parent: Span) -> None:
        self._backend, self._context = backend, trace.set_span_in_context(parent)
        self.resume_timeout_s, self.overlap = backend.resume_timeout_s, backend.overlap

    @property
    def costs(self) -> Costs:
        return self._backend.costs

    @costs.setter
    def costs(self, costs: Costs) -> None:
        self._backend.costs = costs

    def info(self, role: Role) -> ModelInfo:
        return self._backend.info(role)

    async def stats(self) -> dict[Role, EngineStats]:
        return await self._backend.stats()

    async def retrieve(self, contents: list[str], query: str, options: Any) -> Retrieval:
        with _ending(_tracer.start_span("retrieve", self._context)) as span:
            retrieval = await self._backend.retrieve(contents, query, options)
            attributes = {
                "rapid.context_tokens": retrieval.context_tokens,
                "rapid.retrieved_tokens": retrieval.retrieved_tokens,
                "rapid.scores": [chunk.score for chunk in retrieval.chunks],
            }
            span.set_attributes(attributes)
            return retrieval

    @asynccontextmanager
    async def lease(self, role: Role, opening: SequenceRequest) -> AsyncIterator[Lease]:
        attributes = {"rapid.role": role, "rapid.prompt_tokens": len(opening.prompt)}
        async with AsyncExitStack() as stack:
            with _ending(_tracer.start_span("queue", self._context, attributes=attributes)):
                lease = await stack.enter_async_context(self._backend.lease(role, opening))
            yield _TracedLease(lease, self._context, attributes)


class _TracedLease:
    def __init__(self, lease: Lease, context: Context, attributes: dict[str, Any]) -> None:
        self._lease, self._context, self._attributes = lease, context, attributes

    async def prefill(self) -> PrefillResult:
        with _ending(_tracer.start_span("prefill", self._context, attributes=self._attributes)) as span:
            prefilled = await self._lease.prefill()
            span.set_attribute("rapid.cached_tokens", prefilled.cached_tokens)
            return prefilled

    def propose(self, offset: int, tokens: list[int], limits: DraftLimits, draft_top_k: int) -> DraftHandle:
        attributes = {"rapid.offset": offset + len(tokens), "rapid.max_tokens": limits.max_tokens}
        span = _tracer.start_span("draft", self._context, attributes=attributes)

        def drafted(handle: asyncio.Future[Draft]) -> None:
            # Nobody may wait for it any more.
            with suppress(Exception, asyncio.CancelledError), _ending(span):
                draft = handle.result()
                span.set_attributes({"rapid.drafted": len(draft.tokens), "rapid.drafted_ahead": draft.num_ahead})

        handle = asyncio.ensure_future(self._lease.propose(offset, tokens, limits, draft_top_k))
        handle.add_done_callback(drafted)
        return handle

    def ahead(self) -> Awaitable[Draft | None]:
        return self._lease.ahead()

    async def verify(self, draft: DraftHandle | Draft, rule: str, transfer_strength: float) -> VerifyResult:
        if isinstance(draft, asyncio.Future):
            await asyncio.wait([draft])  # a span of its own; what becomes of it is told below
        with _ending(_tracer.start_span("verify", self._context, attributes={"rapid.rule": rule})) as span:
            verified = await self._lease.verify(draft, rule, transfer_strength)
            attributes = {"rapid.drafted": verified.num_drafted, "rapid.accepted": verified.num_accepted}
            span.set_attributes(attributes)
            return verified


@contextmanager
def _ending(span: Span) -> Iterator[Span]:
    """Ends ``span`` with the block, as failed where that raises. It is never the current one: between two steps of a
    generator that would leak into whoever reads it."""
    try:
        yield span
    except Exception as error:
        span.record_exception(error)
        span.set_status(Status(StatusCode.ERROR, str(error)))
        raise
    finally:
        span.end()
