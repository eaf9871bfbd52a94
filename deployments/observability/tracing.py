"""OpenTelemetry spans of what a request does: retrieve, queue, prefill, draft and verify, under one called generate.

The operator says where spans go: under Ray Serve by RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH, which may be
`deployments.observability.tracing:otlp`. Serve's own spans then lead from the client's `traceparent` to ours. Without
that variable nothing is recorded, and nothing is in the way of a round.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, Status, StatusCode

from rapid.backend.protocol import Backend, Lease, Retrieval, Role, Vitals
from rapid.engine.messages import SequenceRequest
from rapid.errors import RapidError
from rapid.events import Finish
from rapid.models.info import ModelInfo
from rapid.request import GenerationRequest

_tracer = trace.get_tracer("rapid")
# By the lease's call.
_SPANS = {
    "prefill": "prefill",
    "propose": "draft",
    "draft_over_view": "draft",
    "refine": "refine",
    "verify": "verify",
    "score": "score",
}


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
        attributes: dict[str, Any] = {
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
        self.is_colocated = backend.is_colocated
        self.history = backend.history
        self.quarantine = backend.quarantine

    def info(self, role: Role) -> ModelInfo:
        return self._backend.info(role)

    async def vitals(self) -> Vitals:
        return await self._backend.vitals()

    async def retrieve(self, contents: list[str], query: str, options: Any) -> Retrieval:
        with _ending(_tracer.start_span("retrieve", self._context)) as span:
            retrieval = await self._backend.retrieve(contents, query, options)
            attributes: dict[str, Any] = {
                "rapid.context_tokens": retrieval.context_tokens,
                "rapid.retrieved_tokens": retrieval.retrieved_tokens,
                "rapid.confidence": retrieval.confidence,
                "rapid.scores": [chunk.score for chunk in retrieval.chunks],
            }
            span.set_attributes(attributes)
            return retrieval

    async def embed(self, texts: list[str], salt: str = "") -> NDArray[np.float32]:
        return await self._backend.embed(texts, salt)

    async def forget(self, tokens: list[int], salt: str = "") -> None:
        await self._backend.forget(tokens, salt)

    @asynccontextmanager
    async def lease(self, role: Role, request: SequenceRequest) -> AsyncIterator[Lease]:
        attributes = {"rapid.role": role, "rapid.prompt_tokens": len(request.prompt)}
        async with AsyncExitStack() as stack:
            with _ending(_tracer.start_span("queue", self._context, attributes=attributes)):
                lease = await stack.enter_async_context(self._backend.lease(role, request))
            yield lease.over(partial(self._call, lease, attributes))

    def _call(self, lease: Lease, attributes: dict[str, Any], method: str, *message: Any) -> Awaitable[Any]:
        """One call of ``lease``, as a span with what its message and its result say of themselves."""
        if method not in _SPANS:
            return lease.call(method, *message)
        said = message[0].attributes() if message else attributes
        span = _tracer.start_span(_SPANS[method], self._context, attributes=said)
        answer = asyncio.ensure_future(lease.call(method, *message))

        def answered(done: asyncio.Future[Any]) -> None:
            # The answer may no longer be waited for.
            with suppress(Exception, asyncio.CancelledError), _ending(span):
                span.set_attributes(done.result().attributes())

        answer.add_done_callback(answered)
        return answer


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
