"""The task that proposes a draft: rolls back to the written output, samples token by token, and may draft ahead."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rapid.engine.clock import Moment
from rapid.engine.messages import DraftRequest, SequenceRequest
from rapid.engine.readout import Download, Draw, Drawing, drafted_token
from rapid.engine.sequence import EarlyResult, ForwardRequest, Sequence, Task
from rapid.kernels.interface import Tokens
from rapid.kernels.transfer import is_asynchronous
from rapid.kv_cache.table import PageTable
from rapid.models.draft_head import DraftHead
from rapid.models.draft_vocabulary import Size
from rapid.speculation.draft import Draft, DraftLimits

_FEW = 4  # tokens that are read at a time, if the host may want fewer than all


class DrawnDraft(NamedTuple):
    """When ``num_first`` tokens were drawn, and when all ``num_drawn``; the draft need not keep them all."""

    first: Moment
    last: Moment
    num_first: int
    num_drawn: int

    @property
    def step_ms(self) -> float:
        """The time of one draft step that read no other token; 0 if it is not known."""
        num_after = self.num_drawn - self.num_first
        return self.first.ms_until(self.last) / num_after if num_after else 0.0


NewHead = Callable[[Size, Iterable[int]], DraftHead | None]


def propose(
    sequence: Sequence, request: DraftRequest, eos: frozenset[int], new_head: NewHead | None = None
) -> Task[Draft]:
    """Samples a draft behind the output; the output's tokens from ``request.offset`` on are ``request.tokens``.

    With ``new_head`` (`rapid.models.model.Model.draft_head`) tokens are drawn from a draft vocabulary.

    The task rolls back earlier draft tokens that differ from these tokens. If tokens were drafted ahead and these
    tokens came as guessed, the draft begins with the rest of them. The draft ends at an end of sequence, or where the
    request's limits expect that the next token would be rejected.

    The caller's thread runs this function, while the engine may be in a pass: so a pass that follows a wrong guess ends
    early. The engine runs the task that this function returns.
    """
    offset, tokens, limits = request.offset, request.tokens, request.limits
    before, rest = sequence.drafting_ahead, Future[Any]() if limits.ahead else None
    if before is not None and sequence.ahead is not None and sequence.position >= offset:
        drafted = sequence.output[offset - sequence.written :] + sequence.ahead.tokens
        if any(ours != theirs for ours, theirs in zip(drafted, tokens, strict=False)):
            before.cancel()
    sequence.drafting_ahead = rest
    return _propose(sequence, request, eos, new_head, before, rest)


def _propose(
    sequence: Sequence,
    request: DraftRequest,
    eos: frozenset[int],
    new_head: NewHead | None,
    before: Future[Any] | None,
    rest: Future[Any] | None,
) -> Task[Draft]:
    """``before`` is the future of tokens that the last request still drafts ahead; ``rest`` is that of this request."""
    started = Moment(sequence.device)
    offset, tokens, limits = request.offset, request.tokens, request.limits
    try:
        _choose_vocabulary(sequence, tokens, eos, new_head)
        ahead = _stop_drafting_ahead(sequence, before)
        start = offset + len(tokens)
        round_start = start if request.round_start is None else request.round_start
        # The first token of `ahead` guesses the token behind an accepted draft. The drafted tokens come after it. A
        # guess of the likeliest is no draw, so it may be a draft token itself.
        guessed = sequence.output[offset - sequence.written :][: len(tokens)] == tokens
        first = start if _drafts_likeliest(sequence.request) else start - 1
        known = ahead.after(start) if ahead is not None and guessed and ahead.offset <= first else Draft(start)
        sequence.rebase(offset, tokens, len(known.tokens))
        draft, ended = known.within(limits, eos)
        num_ahead, num_pending = len(draft.tokens), len(sequence.pending())
        elapsed_ms = step_ms = 0.0
        if not ended:
            drawn = yield from draw_on(sequence, round_start, draft, limits, eos)
            elapsed_ms = started.ms_until(drawn.last)
            step_ms = drawn.step_ms or (elapsed_ms / drawn.num_drawn if num_pending <= 2 else 0.0)
        sequence.output[start - sequence.written :] = draft.tokens
        sequence.cache.truncate(len(sequence.prompt) + len(sequence.output) - 1)
        num_sequences = sequence.shared.num_sequences
        draft = replace(draft, elapsed_ms=elapsed_ms, step_ms=step_ms, num_ahead=num_ahead, num_sequences=num_sequences)
        if rest is None:
            return draft
        ahead = sequence.ahead = Draft(sequence.position)
        yield EarlyResult(draft, rest)
        if not eos & set(draft.tokens[-1:]):
            yield from draw_on(sequence, round_start, ahead, limits.longer(1), eos)
        return draft.followed_by(ahead)
    except BaseException:
        if rest is not None:
            rest.cancel()
        raise


async def drafted_ahead(drafting: Future[Draft] | None) -> Draft | None:
    """The result of a sequence's `drafting_ahead`, once it is done; None if it was stopped.

    The result is the latest draft and ``num_ahead`` tokens behind it, as if all of the draft were accepted: a guess of
    the next token, and a draft behind the guess. The guess is only compared with the token that the target sampled
    without knowing it, and the draft behind it comes from the same q as if it were drafted later. So the output's law
    is the same as without drafting ahead, under every rule.
    """
    if drafting is None:
        return None
    waiting = asyncio.wrap_future(drafting)
    await asyncio.wait([waiting])
    return None if waiting.cancelled() else waiting.result()


def _stop_drafting_ahead(sequence: Sequence, drafting: Future[Any] | None) -> Draft | None:
    """Stops drafting ahead; returns the tokens drafted so far, which are now part of the sequence's output."""
    if drafting is not None:
        drafting.cancel()
    ahead, sequence.ahead = sequence.ahead, None
    if ahead is not None:
        sequence.output += ahead.tokens
    return ahead


def _choose_vocabulary(sequence: Sequence, written: list[int], eos: frozenset[int], new_head: NewHead | None) -> None:
    """Gives ``sequence`` a draft vocabulary, or the tokens ``written`` since the last draft columns in the one it has.

    Under a grammar drafts are drawn from all tokens: none of those that may follow need be in a part of them.
    """
    request, logits, head = sequence.request, sequence.logits, sequence.head
    if head is None and new_head is not None and (logits is None or not logits.has_grammar):
        needed = () if logits is None else logits.needed
        size = request.speculation.draft_vocabulary
        sequence.head = new_head(size, itertools.chain(eos, needed, request.known, request.prompt))
    changed = sequence.head is not head or (head is not None and head.add(written))
    if changed and logits is not None and sequence.head is not None:
        sequence.logits = logits.over(sequence.head.vocabulary)


def draw_on(
    sequence: Sequence,
    start: int,
    draft: Draft,
    limits: DraftLimits,
    eos: frozenset[int],
    view: Callable[[int], PageTable] | None = None,
) -> Task[DrawnDraft]:
    """Samples onto ``draft`` until it ends.

    Each token goes from one pass to the next without the host. The host reads some at a time, and discards those behind
    the draft's end. The random numbers are those of the round that begins at output position ``start``. With a ``view``
    each pass reads the pages that it gives for the number of tokens read so far, and the sequence's cache stays.
    """
    request = sequence.request
    draft_top_k, warping = request.speculation.draft_top_k, request.speculation.warping(request.sampling)
    is_greedy = _drafts_likeliest(request)
    feed: Tokens = sequence.pending()
    unread: list[Tensor] = []
    num_unread = num_first = num_drawn = 0
    drawn_at: list[Moment] = []
    num_read = 0
    follows_grammar = sequence.logits is not None and sequence.logits.has_grammar
    following = None
    if sequence.logits is not None and not follows_grammar:
        following = sequence.logits.following(sequence.emitted(draft.offset) + draft.tokens)

    def goes_on(token: int, confidence: float) -> bool:
        confidences.append(confidence)
        return token not in eos and not limits.stop_after(confidences)

    while True:
        num_left = limits.max_tokens - len(draft.tokens)
        num_wanted = min(_tokens_at_a_time(sequence, limits), num_left)
        # Where the host has each token at once, a pass may draw several and ask behind each whether to go on.
        num_most = num_wanted - num_unread if is_asynchronous(sequence.device) else min(num_left, _FEW)
        step = draft.offset - start + len(draft.tokens) + num_unread
        confidences = list(draft.confidences)
        drawing = Drawing(warping, is_greedy, draft_top_k, sequence.seed, start, step, num_most, following, goes_on)
        table = view(num_read) if view else None
        num_read += len(feed)
        if follows_grammar:
            assert sequence.logits is not None
            logits = yield ForwardRequest(sequence, feed, 1, table)
            logits = sequence.logits(logits, sequence.emitted(draft.offset) + draft.tokens)
            drawn = yield Draw(logits, drawing, None if sequence.head is None else sequence.head.ids)
        else:
            drawn = yield ForwardRequest(sequence, feed, 1, table, drawing=drawing)
        feed = drawn.last
        unread.append(drawn.values)
        num_unread += len(drawn.values)
        num_drawn += len(drawn.values)
        num_first = num_first or num_drawn
        drawn_at.append(Moment(sequence.device))
        if num_unread < num_wanted:
            continue
        read = yield Download(torch.cat(unread).flatten())
        if any(draft.append(drafted_token(row), limits, eos) for row in read.reshape(num_unread, -1)):
            return DrawnDraft(drawn_at[0], drawn_at[-1], num_first, num_drawn)
        unread.clear()
        num_unread = 0


def _drafts_likeliest(request: SequenceRequest) -> bool:
    return request.speculation.drafts_likeliest(request.sampling)


def _tokens_at_a_time(sequence: Sequence, limits: DraftLimits) -> int:
    """How many tokens are drawn before the host reads them."""
    follows_grammar = sequence.logits is not None and sequence.logits.has_grammar
    if follows_grammar or not is_asynchronous(sequence.device):
        return 1  # the grammar must read each token, or reading it costs nothing
    # The draft may end at any token, or somebody may want what has been drafted ahead.
    return _FEW if limits.acceptance or limits.ahead else limits.max_tokens
