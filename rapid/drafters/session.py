"""One request's state, which the target and all of its drafters share."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Any

from rapid.backend.protocol import Backend, Retrieval
from rapid.events import Statistics
from rapid.request import GenerationRequest
from rapid.sampling.params import LogitParams
from rapid.speculation.learned import Learned

Retrieve = Callable[[list[str], str, Any], Awaitable[Retrieval]]


class Session:
    """``output`` holds all tokens that were written so far; it grows with every round.

    ``by_the_clock`` says whether choices may depend on measured times: they may not where a seed has to be honoured.
    ``max_new_tokens`` is the room that each of the request's sequences needs; ``logits`` says how the logits are
    adjusted. Both are set once the prompt is known to fit. ``learned`` is what the request knows of its rounds.
    """

    max_new_tokens: int
    logits: LogitParams | None

    def __init__(self, request: GenerationRequest, backend: Backend, retrieve: Retrieve) -> None:
        self.request, self.backend = request, backend
        self.output: list[int] = []
        self.statistics = Statistics(request.speculation.strategy, prompt_tokens=len(request.prompt.tokens))
        self.by_the_clock = request.sampling.seed is None or request.sampling.temperature == 0
        self._retrieve = retrieve
        self._kind = _kind(request)
        self.learned = backend.history.of(self._kind) if self.by_the_clock else Learned()

    def keep_learned(self) -> None:
        """Leaves what was measured to later requests. With a seed nothing of others counts, nor anything for others."""
        if self.by_the_clock:
            self.backend.history.keep(self._kind, self.learned)

    async def retrieved_prompt(self) -> list[int] | None:
        """The prompt with the retrieved passages in the place of its context.

        Returns None, with the reason in ``statistics.fallback``, if there is no context or no passage reached the
        threshold.

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
        statistics.context_tokens, statistics.retrieved_tokens = retrieval.context_tokens, retrieval.retrieved_tokens
        statistics.chunks = [
            {"position": c.position, "score": round(c.score, 4), "content": c.content, "start": c.start, "end": c.end}
            for c in retrieval.chunks
        ]
        if not retrieval.chunks:
            statistics.fallback = "nothing_above_threshold"
            return None
        return prompt.shortened(retrieval.chunks)


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
