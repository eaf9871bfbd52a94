"""How probable the target finds the tokens of a prompt: what is asked of a model to compare given texts."""

from __future__ import annotations

from rapid.backend.leases import TargetLease
from rapid.backend.protocol import Backend
from rapid.engine.messages import SequenceRequest
from rapid.errors import ContextLengthExceeded, InvalidRequest
from rapid.events import NamedToken, PromptToken, Statistics, TokenLogprobs
from rapid.request import GenerationRequest
from rapid.text.tokenizer import spell

MAX_LOGPROBS = 2**19  # of one prompt: each is named in the answer


async def prompt_logprobs(request: GenerationRequest, num_top: int, backend: Backend) -> list[PromptToken]:
    """The tokens of the request's prompt, each with its log-probability and the ``num_top`` likeliest in its place.

    The target reads the whole prompt, whatever the strategy.

    Raises:
        ContextLengthExceeded: the prompt does not fit the target's window.
        InvalidRequest: there would be more than `MAX_LOGPROBS`.
        EngineLost, Overloaded: as `rapid.generate.generate`.
    """
    tokens, tokenizer, info = request.prompt.tokens, request.prompt.tokenizer, backend.info("target")
    if len(tokens) > info.window:
        raise ContextLengthExceeded(prompt_tokens=len(tokens), max_tokens=0, window=info.window, param="prompt")
    if len(tokens) * (1 + num_top) > MAX_LOGPROBS:
        most = MAX_LOGPROBS // len(tokens) - 1
        raise InvalidRequest(f"{len(tokens)} tokens can come with {most} likeliest ones each at most", param="logprobs")

    def name(token: int, logprob: float) -> NamedToken:
        return NamedToken(token, spell(tokenizer, token), logprob)

    named = [PromptToken(tokens[0], spell(tokenizer, tokens[0]))]
    if len(tokens) == 1:
        return named
    opened = SequenceRequest(tokens[:1], len(tokens) - 1, request.sampling, salt=request.salt)
    target = TargetLease(backend, "target", opened, [], Statistics(request.speculation.strategy), scored=tokens[1:])
    try:
        await target.open()
        scored = await target.score(min(num_top, len(tokenizer)))
    finally:
        await target.close()
    for token, logprob, rank, top in zip(tokens[1:], scored.logprobs, scored.ranks, scored.top, strict=True):
        chosen = name(token, logprob)
        named.append(PromptToken(token, chosen.spelled, TokenLogprobs(chosen, [name(*each) for each in top]), rank))
    return named
