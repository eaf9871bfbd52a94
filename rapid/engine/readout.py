"""What tasks want between two passes: to draw a draft token, to verify a draft, to read values on the host.

A task yields a `Draw`, a `Verify` or a `Download`, and the engine sends it the answer. Each iteration computes each
kind for all tasks that want it, in a few calls on the device. Only a `Download` waits for the device, and an iteration
has at most one. So a draft that is read at its end makes the host wait once, and so does a verification.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rapid.kernels.transfer import download, upload
from rapid.sampling.noise import Noise, Purpose
from rapid.sampling.params import SamplingParams
from rapid.sampling.row_params import RowParams, truncates
from rapid.sampling.sampler import warp
from rapid.speculation.draft import Draft, DraftedToken, Logprobs, Pairs
from rapid.speculation.drawing import DrawnTokens, draw, draw_greedily
from rapid.speculation.verification import DraftRows, Rule, Verdict, dense, output_law, verify, verify_greedy

Floats = NDArray[np.float64]
Wish = TypeVar("Wish")
Answer = TypeVar("Answer")


class Drawn(NamedTuple):
    """Drawn tokens: the last one [1], and all that the host may want to know of each, a row of numbers [tokens, n].

    Both are on the device.
    """

    last: Tensor
    values: Tensor


class Drawing(NamedTuple):
    """How draft tokens are drawn, up to ``num_tokens`` of them; the answer is `Drawn`.

    The random numbers are those from step ``step`` on in the round that begins at output position ``round_start``.
    """

    sampling: SamplingParams
    draft_top_k: int
    seed: int
    round_start: int
    step: int
    num_tokens: int


class Draw(NamedTuple):
    """Draws one draft token from ``logits`` [1, V]; the answer is `Drawn`.

    ``ids`` [V] are the tokens of the columns; None if these are all tokens.
    """

    logits: Tensor
    drawing: Drawing
    ids: Tensor | None

    @staticmethod
    def together(wishes: Sequence[Draw]) -> list[Drawn]:
        return _in_groups(wishes, _kind_of_draw, _draw)


class Verify(NamedTuple):
    """Verifies ``draft`` by its target's ``logits`` [γ+1, V]; the answer has the numbers of a `Verdict`, on the device.

    With ``num_logprobs``, each row's log-probabilities are among them.
    """

    logits: Tensor
    draft: Draft
    sampling: SamplingParams
    rule: Rule
    transfer_strength: float
    seed: int
    num_logprobs: int | None

    @staticmethod
    def together(wishes: Sequence[Verify]) -> list[Tensor]:
        return _in_groups(wishes, _kind_of_verification, _verify)


class Download(NamedTuple):
    """Reads ``values`` (float64 [n]) on the host; the answer is the same as an array."""

    values: Tensor

    @staticmethod
    def together(wishes: Sequence[Download]) -> list[Floats]:
        if len(wishes) == 1:
            return [download(wishes[0].values)]
        ends = np.cumsum([len(values) for (values,) in wishes])
        return np.split(download(_joined([values for (values,) in wishes])), ends[:-1])


Readout = Draw | Verify | Download


def drafted_token(values: Floats) -> DraftedToken:
    """The token, q and confidence of one of the `Drawn`, from its values on the host."""
    token, confidence, pairs = int(values[0]), float(values[1]), values[2:]
    if not len(pairs):
        return token, (np.array([token], np.int32), np.ones(1, np.float32)), confidence
    ids, weights = np.split(pairs, 2)
    inside = weights > 0
    return token, (ids[inside].astype(np.int32), weights[inside].astype(np.float32)), confidence


def verdict(values: Floats, draft: Draft) -> tuple[int, list[int], list[Logprobs]]:
    """How many tokens of ``draft`` were accepted, what the round emits, and its log-probabilities, if asked for."""
    num_accepted = int(values[0])
    emitted = [*draft.tokens[:num_accepted], int(values[1])]
    logprobs = []
    if len(values) > 2:
        for own, *top in values[2:].reshape(len(draft.tokens) + 1, -1)[: num_accepted + 1].tolist():
            likely, ids = top[: len(top) // 2], map(int, top[len(top) // 2 :])
            logprobs.append(Logprobs(own, [(i, v) for i, v in zip(ids, likely, strict=True) if v > -np.inf]))
    return num_accepted, emitted, logprobs


def _in_groups(
    wishes: Sequence[Wish], kind: Callable[[Wish], Hashable], compute: Callable[[Sequence[Wish]], Sequence[Answer]]
) -> list[Answer]:
    """The answers of ``compute`` to each group of ``wishes`` of the same ``kind``, in the order of the wishes."""
    if len(wishes) == 1:
        return list(compute(wishes))
    groups: dict[Hashable, list[int]] = {}
    for i, wish in enumerate(wishes):
        groups.setdefault(kind(wish), []).append(i)
    answers: dict[int, Answer] = {}
    for members in groups.values():
        answers.update(zip(members, compute([wishes[i] for i in members]), strict=True))
    return [answers[i] for i in range(len(wishes))]


def _kind_of_draw(wish: Draw) -> Hashable:
    drawing = wish.drawing
    return drawing.sampling.temperature > 0 and drawing.draft_top_k, wish.logits.shape[-1], wish.ids is None


def _draw(wishes: Sequence[Draw]) -> list[Drawn]:
    """Draws for wishes with one ``draft_top_k`` and rows of one length, or for greedy ones."""
    logits, drawings = _joined([each.logits for each in wishes]), [each.drawing for each in wishes]
    listed = [each.ids for each in wishes if each.ids is not None]
    ids = torch.stack(listed) if listed else None
    if drawings[0].sampling.temperature == 0:
        drawn = draw_greedily(logits, ids)
    else:
        places = upload([(each.seed, each.round_start, each.step) for each in drawings], "int64", logits.device)
        params = RowParams.of([each.sampling for each in drawings], logits.device)
        drawn = draw(logits, params, drawings[0].draft_top_k, draft_keys(places), ids)
    return list(map(Drawn, drawn.tokens.split(1), drawn_values(drawn).split(1)))


def draft_keys(places: Tensor, more: int = 0) -> Tensor:
    """The keys [B] of draft tokens at ``places`` [B, 3] (seed, where the round begins, step), ``more`` steps on."""
    return Noise(places[:, 0], places[:, 1]).keys(Purpose.DRAFT, places[:, 2:3] + more).squeeze(-1)


def drawn_values(drawn: DrawnTokens) -> Tensor:
    """What the host may want to know of tokens, [B, n]: the token, its confidence, and q."""
    columns = (drawn.tokens.unsqueeze(-1), drawn.confidences.unsqueeze(-1), drawn.ids, drawn.weights)
    return torch.cat([column.double() for column in columns], -1)


def _kind_of_verification(wish: Verify) -> Hashable:
    return wish.sampling.temperature > 0 and wish.rule, truncates(wish.sampling, wish.logits.shape[-1])


def _verify(wishes: Sequence[Verify]) -> list[Tensor]:
    """Verifies drafts by one rule, or greedily."""
    device = wishes[0].logits.device
    is_greedy = wishes[0].sampling.temperature == 0
    drafts = _draft_rows([each.draft for each in wishes], device, with_q=not is_greedy)
    logits = _joined([each.logits for each in wishes])
    if is_greedy:
        laws: list[Tensor | None] = [None] * len(wishes)
        found = verify_greedy(drafts, logits.argmax(-1))
    else:
        strength: float | Tensor = wishes[0].transfer_strength
        if len(wishes) == 1:
            params = RowParams.of([wishes[0].sampling], device)
        else:
            params = RowParams.of([each.sampling for each in wishes for _ in range(len(each.logits))], device)
            strengths = [[each.transfer_strength] for each in wishes for _ in each.draft.tokens]
            strength = upload(strengths or np.zeros((0, 1)), "float32", device)
        target_probs = warp(logits, params)
        places = upload([(each.seed, each.draft.offset) for each in wishes], "int64", device)
        noise = Noise(places[:, 0], places[:, 1])
        if drafts.longest and device.type == "cpu" and params.truncate(logits.shape[-1]):
            found = _verify_possible(wishes[0].rule, drafts, target_probs, strength, noise)
        else:
            found = verify(wishes[0].rule, drafts, target_probs, strength, noise)
        laws = [
            None if each.num_logprobs is None else _law(each, probs)
            for each, probs in zip(wishes, target_probs.split([len(each.logits) for each in wishes]), strict=True)
        ]
    numbers = torch.stack(found, -1).double()  # [B, 2]
    return [
        row if each.num_logprobs is None else torch.cat([row, _logprobs(each, row.long(), law)])
        for each, row, law in zip(wishes, numbers, laws, strict=True)
    ]


def _verify_possible(
    rule: Rule, drafts: DraftRows, target_probs: Tensor, strength: float | Tensor, noise: Noise
) -> Verdict:
    """`verify` over the tokens that p or q of any row allow: all others stay impossible under every rule.

    After top-p these are some hundred, and a rule reads and writes its rows a dozen times.
    """
    possible = target_probs.amax(0) > 0
    possible[drafts.ids] = possible[drafts.tokens] = True
    ids = possible.nonzero().squeeze(-1)
    places = torch.empty(len(possible), dtype=torch.long)
    places[ids] = torch.arange(len(ids))
    drafts = drafts._replace(tokens=places[drafts.tokens], ids=places[drafts.ids])
    return verify(rule, drafts, target_probs.index_select(-1, ids), strength, noise, ids)


def _draft_rows(drafts: Sequence[Draft], device: torch.device, *, with_q: bool) -> DraftRows:
    lengths = [len(draft.tokens) for draft in drafts]
    firsts = list(accumulate(lengths, initial=0))[:-1]
    counts, starts = upload([lengths, firsts], "int64", device).unbind()
    none = counts[:0]
    if not any(lengths):  # plain decoding
        return DraftRows(none, none, none, none, none, none, counts, starts, 0)
    columns = [
        [token for draft in drafts for token in draft.tokens],
        [
            first + b + step
            for b, (first, length) in enumerate(zip(firsts, lengths, strict=True))
            for step in range(length)
        ],
        [step for length in lengths for step in range(length)],
        [b for b, length in enumerate(lengths) for _ in range(length)],
    ]
    ids = weights = none
    if with_q:
        ids, weights = _padded([pair for draft in drafts for pair in draft.distributions], device)
    tokens, rows, steps, sequences = upload(columns, "int64", device).unbind()
    return DraftRows(tokens, rows, steps, sequences, ids, weights, counts, starts, max(lengths))


def _padded(pairs: Sequence[Pairs], device: torch.device) -> tuple[Tensor, Tensor]:
    """The ids and weights of ``pairs`` as rows [n, k]."""
    sizes = np.array([len(ids) for ids, _ in pairs])
    is_filled = np.arange(sizes.max()) < sizes[:, None]
    ids, weights = np.zeros(is_filled.shape, np.int64), np.zeros(is_filled.shape, np.float32)
    ids[is_filled], weights[is_filled] = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return upload(ids, "int64", device), upload(weights, "float32", device)


def _law(wish: Verify, target_probs: Tensor) -> Tensor:
    """The law [γ+1, V] of what ``wish`` emits, from its rows of p."""
    if not wish.draft.tokens:
        return target_probs
    draft_probs = dense(*_padded(wish.draft.distributions, target_probs.device), target_probs.shape[-1])
    return output_law(wish.rule, draft_probs, target_probs, wish.transfer_strength)


def _logprobs(wish: Verify, found: Tensor, law: Tensor | None) -> Tensor:
    """For each of γ+1 rows: the emitted token's log-probability, the largest ones, and their tokens; one column.

    Rows behind the emitted token are of no meaning. A greedy choice has probability 1, which is no information: the
    unwarped distribution is reported instead.
    """
    log_probs = wish.logits.log_softmax(-1) if law is None else law.log()
    num_accepted, next_token = found
    drafted = upload([*wish.draft.tokens, 0], "int64", log_probs.device)
    places = torch.arange(len(drafted), device=drafted.device)
    emitted = torch.where(places == num_accepted, next_token, drafted)
    own = log_probs.gather(-1, emitted.unsqueeze(-1))
    top, ids = log_probs.topk(min(wish.num_logprobs or 0, log_probs.shape[-1]))
    return torch.cat([own.double(), top.double(), ids.double()], -1).flatten()


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """``parts``, one below the other. If they lie so in memory, as the rows of one pass do, nothing is copied."""
    if len(parts) == 1:
        return parts[0]
    first, end = parts[0], parts[0].storage_offset()
    memory = first.untyped_storage()._cdata
    for part in parts:
        if part.storage_offset() != end or part.untyped_storage()._cdata != memory or not part.is_contiguous():
            return torch.cat(list(parts))
        end += part.numel()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
