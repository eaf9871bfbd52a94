"""The tasks on the target: prefill a prompt, verify a draft.

`rapid.engine.engine.Engine` runs them. A verification fails if its draft was made for another position of the output,
so a lost or doubled token is an error and never a wrong text.
"""

from __future__ import annotations

import torch

from rapid.engine.clock import Moment
from rapid.engine.messages import PrefillResult, VerifyRequest
from rapid.engine.readout import Download
from rapid.engine.sequence import ForwardRequest, Sequence, Task
from rapid.engine.verdicts import Bound, How, Verify, verdict
from rapid.speculation.draft import Draft, VerifyResult
from rapid.speculation.verification import RULES


def prefill(sequence: Sequence) -> Task[PrefillResult]:
    """Fills the cache with all of the prompt but its last token, which the first round reads."""
    if len(sequence.prompt) - 1 <= sequence.cache.length:
        return PrefillResult(sequence.cached_tokens, 0.0)
    started = Moment(sequence.device)
    yield ForwardRequest(sequence, None, 0)
    ended = Moment(sequence.device)
    yield Download(torch.zeros(1, dtype=torch.float64, device=sequence.device))  # the prefill ends when it is computed
    return PrefillResult(sequence.cached_tokens, started.ms_until(ended))


def verify_draft(sequence: Sequence, request: VerifyRequest) -> Task[VerifyResult]:
    """One round on the target: scores [last token; draft] in one pass, accepts or recovers, rolls back (paper §3.3).

    A draft that was looked up is cut before the first token that breaks the request's grammar.

    Raises:
        ValueError: the draft was made for another position of the output, or a sampled draft breaks the grammar.
    """
    started = Moment(sequence.device)
    draft = request.draft
    if draft.offset != sequence.position:
        raise ValueError(f"a draft for output position {draft.offset} met a sequence at {sequence.position}")
    if sequence.logits is not None:
        draft = within_grammar(draft, sequence.logits.num_allowed(sequence.emitted(draft.offset), draft.tokens))
    how = _how(request, sequence, draft)
    if how.is_everywhere:
        draft = draft.before(len(draft.tokens) - 1)
    gamma = len(draft.tokens)
    logits = yield ForwardRequest(sequence, sequence.pending() + draft.tokens, gamma + 1)  # [γ+1, V]
    if sequence.logits is not None:
        logits = sequence.logits(logits, sequence.emitted(draft.offset), draft.tokens)
    found = yield Verify(logits, draft, how)
    ended = Moment(sequence.device)
    values = yield Download(found)  # the one wait for the device
    num_accepted, emitted, transferred, logprobs = verdict(values, draft, how)
    sequence.output += emitted
    sequence.cache.truncate(len(sequence.prompt) + len(sequence.output) - 1)
    return VerifyResult(
        emitted,
        gamma,
        num_accepted,
        draft.num_ahead,
        draft.confidences,
        draft.elapsed_ms,
        draft.step_ms,
        started.ms_until(ended),
        sequence.shared.num_sequences,
        sequence.shared.num_tokens - sequence.shared.num_sequences,
        draft.num_sequences,
        logprobs,
        transferred,
    )


def _how(request: VerifyRequest, sequence: Sequence, draft: Draft) -> How:
    """How this draft is verified: losslessly if q may not change the output."""
    opened, speculation = sequence.request, sequence.request.speculation
    how = How(
        opened.sampling,
        sequence.seed,
        draft.distributions,
        num_logprobs=opened.num_logprobs,
    )
    if not (request.transfers and draft.tokens and speculation.transfers):
        return how
    trust, strength = request.trust, speculation.transfer_strength
    bound = Bound(speculation.transfer_divergence, trust.confidence, trust.agreement)
    return how._replace(
        transfer_temperature=speculation.transfer_temperature,
        rule=RULES[speculation.verification],
        strength=bound if strength == "auto" else strength,
    )


def within_grammar(draft: Draft, num_allowed: int) -> Draft:
    """``draft`` up to the first token that breaks the grammar.

    A cut because of a sampled token would change the output's law. A looked-up draft has no choice to bias, and a
    sampling drafter applies the grammar itself, so it never draws such a token.
    """
    if num_allowed < len(draft.tokens) and len(draft.distributions[num_allowed][0]) > 1:
        raise ValueError(f"the drafter drew token {draft.tokens[num_allowed]}, which breaks the grammar")
    return draft.before(num_allowed)
