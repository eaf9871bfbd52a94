"""One request's state, which the target and all of its drafters share."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from rapid.backend.protocol import Backend, Retrieval
from rapid.events import Statistics
from rapid.request import GenerationRequest
from rapid.sampling.params import LogitParams

Retrieve = Callable[[list[str], str, Any], Awaitable[Retrieval]]


class Session:
    """``output`` holds all tokens that were written so far; it grows with every round.

    ``by_the_clock`` says whether choices may depend on measured times: they may not where a seed has to be honoured.
    ``max_new_tokens`` is the room that each of the request's sequences needs; ``logits`` says how the logits are
    adjusted. Both are set once the prompt is known to fit.
    """

    max_new_tokens: int
    logits: LogitParams | None

    def __init__(self, request: GenerationRequest, backend: Backend, retrieve: Retrieve) -> None:
        self.request, self.backend = request, backend
        self.output: list[int] = []
        self.statistics = Statistics(request.speculation.strategy, prompt_tokens=len(request.prompt.tokens))
        self.by_the_clock = request.sampling.seed is None or request.sampling.temperature == 0
        self._retrieve = retrieve

    async def retrieved_prompt(self, *, at_any_score: bool = False) -> list[int] | None:
        """The prompt with the retrieved passages in the place of its context.

        Returns None, with the reason in ``statistics.fallback``, if there is no context, or no passage reached the
        threshold; ``at_any_score`` takes the best passages all the same.

        Raises:
            RetrievalFailed: the retriever or its store is gone or failed.
        """
        prompt, statistics = self.request.prompt, self.statistics
        if not prompt.contents:
            statistics.fallback = "no_long_context"
            return None
        started = time.perf_counter()
        retrieval = await self._retrieve(prompt.contents, prompt.query, self.request.retrieval)
        statistics.timings_ms["retrieval"] = (time.perf_counter() - started) * 1e3
        statistics.context_tokens, statistics.confidence = retrieval.context_tokens, round(retrieval.confidence, 4)
        if not retrieval.chunks or not (retrieval.reaches_threshold or at_any_score):
            statistics.fallback = "nothing_above_threshold"
            return None
        statistics.retrieved_tokens = retrieval.retrieved_tokens
        statistics.chunks = [
            {"position": c.position, "score": round(c.score, 4), "content": c.content, "start": c.start, "end": c.end}
            for c in retrieval.chunks
        ]
        return prompt.shortened(retrieval.chunks)
