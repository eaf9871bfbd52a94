"""The tasks by which a target drafts for itself over a view of its own pages: alone, or refining another's draft.

There is no second copy of weights, keys or values. A pass over a view writes behind the end of the sequence's cache,
which stays where it is. The verification that follows reads the last token and all of the draft from there, over all
pages. So it replaces every key and value that was computed over a view, and only its own are ever indexed.
"""

from __future__ import annotations

from dataclasses import replace

from rapid.engine.clock import Moment
from rapid.engine.messages import RefineRequest, SelfDraftRequest
from rapid.engine.page_ranking import rank_pages, view_of
from rapid.engine.propose import draw_on
from rapid.engine.readout import Download, refined_tokens
from rapid.engine.refine import Refine
from rapid.engine.sequence import ForwardRequest, Sequence, Task
from rapid.engine.verify import within_grammar
from rapid.kv_cache.table import PageTable
from rapid.speculation.draft import Draft, DraftLimits

_NO_LIMITS = DraftLimits(2**31)
_GOLDEN = 0x9E3779B97F4A7C15


def draft_over_view(sequence: Sequence, request: SelfDraftRequest, eos: frozenset[int]) -> Task[Draft]:
    """Samples a draft behind the output, over ``request.view``; the view slides with every token (arXiv 2408.11049).

    Raises:
        ValueError: the sender's output has another length.
    """
    _check(sequence, request.offset)
    started = Moment(sequence.device)
    ranking = yield from rank_pages(sequence, request.view.kind)
    ranked = Moment(sequence.device)

    def table(num_ahead: int) -> PageTable:
        return view_of(sequence.cache, ranking, request.view, num_ahead)

    draft = Draft(request.offset)
    drawing = yield from draw_on(sequence, request.offset, draft, request.limits, eos, table)
    step_ms = drawing.step_ms or ranked.ms_until(drawing.last)
    return replace(draft, elapsed_ms=started.ms_until(drawing.last), step_ms=step_ms)


def refine(sequence: Sequence, request: RefineRequest, eos: frozenset[int]) -> Task[Draft]:
    """Verifies ``request.draft`` over ``request.view``: a pass of TriForce's middle model (arXiv 2404.11912).

    The answer begins at the output position of ``request.draft``. It has the accepted tokens and one more, each with
    the middle's truncated q, which is exactly its law: where a token is rejected, the next one comes from the residual
    norm(max(q − q', 0)), q' being the law that the rejected one was drawn from. (The release draws it from q.) The
    random numbers belong to this round alone, as those of any draft.

    Raises:
        ValueError: the sender's output has another length, or a sampled draft breaks the grammar.
    """
    drafted, offset = request.drafted, request.draft.offset
    _check(sequence, offset - len(drafted))
    started = Moment(sequence.device)
    ranking = yield from rank_pages(sequence, request.view.kind)
    ranked = Moment(sequence.device)
    draft, so_far = request.draft, sequence.emitted(sequence.position) + drafted
    if sequence.logits is not None:
        draft = within_grammar(draft, sequence.logits.num_allowed(so_far, draft.tokens))
    pending = sequence.pending()
    num_read = _num_read(sequence, drafted)
    fed = (pending + drafted)[num_read:] + draft.tokens
    table = view_of(sequence.cache, ranking, request.view, num_read)
    logits = yield ForwardRequest(sequence, fed, len(draft.tokens) + 1, table)
    if sequence.logits is not None:
        logits = sequence.logits(logits, so_far, draft.tokens)
    opened = sequence.request
    wish = Refine(logits, draft, opened.sampling, opened.speculation.draft_top_k, _round_seed(sequence))
    values = yield wish
    ended = Moment(sequence.device)
    tokens = refined_tokens((yield Download(values)), len(draft.tokens) + 1)
    refined = Draft(offset)
    for token in tokens:
        if refined.append(token, _NO_LIMITS, eos):
            break
    sequence.over_view = sequence.position, drafted + refined.tokens[:-1]
    return replace(refined, elapsed_ms=started.ms_until(ended), step_ms=ranked.ms_until(ended))


def _check(sequence: Sequence, offset: int) -> None:
    if offset != sequence.position:
        raise ValueError(f"a draft for output position {offset} was asked of a sequence at {sequence.position}")


def _num_read(sequence: Sequence, drafted: list[int]) -> int:
    """How many of the pending tokens and ``drafted`` passes over the view have read in this round."""
    position, read = sequence.over_view
    if position != sequence.position:
        return 0
    agree = 0
    while agree < min(len(read), len(drafted)) and read[agree] == drafted[agree]:
        agree += 1
    return len(sequence.pending()) + min(agree, len(drafted) - 1)


def _round_seed(sequence: Sequence) -> int:
    """The seed of the middle's numbers in this round: a discarded draft's numbers must not come again in a later one.

    Positions are drafted in several rounds, and numbers for acceptance go by seed and position alone.
    """
    mixed = (sequence.seed ^ _GOLDEN) + (sequence.position + 1) * _GOLDEN
    return (mixed + 2**63) % 2**64 - 2**63
