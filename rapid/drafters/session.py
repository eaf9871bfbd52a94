"""One request's state, which the target and all of its drafters share."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any

from rapid.backend.leases import TargetLease
from rapid.backend.protocol import Backend, Retrieval, RetrievedChunk
from rapid.events import Statistics
from rapid.request import GenerationRequest
from rapid.sampling.params import LogitParams
from rapid.speculation.draft import Trust, VerifyResult
from rapid.speculation.learned import Learned

Retrieve = Callable[[list[str], str, Any], Awaitable[Retrieval]]


class Session:
    """``output`` holds all tokens that were written so far; it grows with every round.

    ``by_the_clock`` says whether choices may depend on measured times: they may not where a seed has to be honoured.
    ``trust`` bounds the transfer where η is chosen: how sure retrieval is, and the agreement of p and q so far. The
    session is ``unsure`` if no passage reached the threshold: then the best ones are drafted from, without transfer.
    ``max_new_tokens`` is the room that each of the request's sequences needs; ``logits`` says how the logits are
    adjusted. Both are set once the prompt is known to fit. ``target`` is the sequence that verifies, which has read the
    prompt before any drafter is started. ``learned`` is what the request knows of its rounds.
    """

    target: TargetLease
    max_new_tokens: int
    logits: LogitParams | None

    def __init__(self, request: GenerationRequest, backend: Backend, retrieve: Retrieve) -> None:
        self.request, self.backend = request, backend
        self.output: list[int] = []
        self.statistics = Statistics(request.speculation.strategy, prompt_tokens=len(request.prompt.tokens))
        is_drawn = not request.speculation.drafts_likeliest(request.sampling)  # so the text depends on its rounds
        self.by_the_clock = request.sampling.seed is None or not is_drawn
        self.trust = Trust(confidence=0.0)
        self.unsure = False
        self._retrieve = retrieve
        self._retrieved: Retrieval | None = None
        self._kind = _kind(request)
        self.learned = backend.history.of(self._kind) if self.by_the_clock else Learned()

    def keep_learned(self) -> None:
        """Leaves what was measured to later requests. With a seed nothing of others counts, nor anything for others."""
        if self.by_the_clock:
            self.backend.history.keep(self._kind, self.learned)

    def learn(self, verdict: VerifyResult) -> None:
        """Takes up what the target's engine found out about the transfer in a round."""
        found = verdict.transferred
        if found is not None:
            self.trust = self.trust._replace(agreement=found.agreement)
            self.statistics.transfer.add(found, self.trust.confidence)

    async def retrieved_prompt(self, *, at_any_score: bool = False) -> list[int] | None:
        """The prompt with the retrieved passages in the place of its context; None where `retrieved` gives none.

        Raises:
            RetrievalFailed: the retriever or its store is gone or failed.
        """
        chunks = await self.retrieved(at_any_score=at_any_score)
        return self.request.prompt.shortened(chunks) if chunks else None

    async def retrieved(self, *, at_any_score: bool = False) -> Sequence[RetrievedChunk]:
        """The retrieved passages, in document order; they are retrieved once.

        None are there, with the reason in ``statistics.fallback``, if there is no context, or no passage reached the
        threshold; ``at_any_score`` takes the best passages all the same.

        Raises:
            RetrievalFailed: the retriever or its store is gone or failed.
        """
        prompt, statistics = self.request.prompt, self.statistics
        if not prompt.contents:
            statistics.fallback = "no_long_context"
            return ()
        if self._retrieved is None:
            self._retrieved = await self.retrieve(prompt.query)
        retrieval = self._retrieved
        statistics.context_tokens, statistics.confidence = retrieval.context_tokens, round(retrieval.confidence, 4)
        if not retrieval.chunks or not (retrieval.reaches_threshold or at_any_score):
            statistics.fallback = "nothing_above_threshold"
            return ()
        self.rely_on(retrieval)
        return retrieval.chunks

    async def retrieve(self, query: str) -> Retrieval:
        """What of the prompt's contents is relevant to ``query``.

        Raises:
            RetrievalFailed: the retriever or its store is gone or failed.
        """
        started = time.perf_counter()
        retrieval = await self._retrieve(self.request.prompt.contents, query, self.request.retrieval)
        self.statistics.timings_ms["retrieval"] += (time.perf_counter() - started) * 1e3
        return retrieval

    def rely_on(self, retrieval: Retrieval) -> None:
        """From now on the passages of ``retrieval`` are those that count."""
        statistics = self.statistics
        self.trust = self.trust._replace(confidence=retrieval.confidence)
        self.unsure = not retrieval.reaches_threshold
        statistics.confidence = round(retrieval.confidence, 4)
        statistics.context_tokens, statistics.retrieved_tokens = retrieval.context_tokens, retrieval.retrieved_tokens
        statistics.chunks = [
            {"position": c.position, "score": round(c.score, 4), "content": c.content, "start": c.start, "end": c.end}
            for c in retrieval.chunks
        ]


def _kind(request: GenerationRequest) -> Hashable:
    """What rounds' costs and acceptance depend on."""
    sampling, logits = request.sampling, request.logits
    penalised = logits.repetition_penalty != 1 or bool(logits.frequency_penalty or logits.presence_penalty)
    return (
        request.speculation,
        len(request.prompt.tokens).bit_length(),
        round(sampling.temperature, 1),
        sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0,
        penalised or bool(logits.logit_bias),
        logits.grammar is not None,
        request.num_logprobs is not None,
    )
