"""Verifies the drafts of many sequences at once, each in the way that its request asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rapid.engine.grouping import in_groups, joined
from rapid.kernels.transfer import upload
from rapid.sampling.noise import Noise, Purpose
from rapid.sampling.params import SamplingParams
from rapid.sampling.row_params import RowParams, truncates
from rapid.sampling.sampler import sample, tempered, warp, warp_to_few
from rapid.speculation.draft import Draft, Logprobs, Pairs, Transferred
from rapid.speculation.rows import DraftRows, dense, draft_rows, padded
from rapid.speculation.trust_region import Region, choose, running_agreement
from rapid.speculation.verification import (
    LOSSLESS,
    Rule,
    Verdict,
    augmented_logits,
    output_law,
    verify,
    verify_chosen,
)


class Bound(NamedTuple):
    """η is chosen for each position: ``most`` is ε_max, ``agreement`` is a where the round begins."""

    most: float
    confidence: float
    agreement: float


class How(NamedTuple):
    """How a draft is verified.

    ``sampling`` is the request's. With a ``transfer_temperature`` above 0, which makes p of the logits in the place of
    its temperature, each token is chosen by the augmented logits. ``distributions`` has the q of each position with a
    q: those of the draft's tokens, and with a transfer temperature that of the position behind them.
    """

    sampling: SamplingParams
    seed: int
    distributions: Sequence[Pairs]
    rule: Rule = LOSSLESS
    strength: float | Bound = 0.0
    transfer_temperature: float = 0.0
    num_logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.sampling.temperature == 0

    @property
    def is_everywhere(self) -> bool:
        return self.transfer_temperature > 0

    @property
    def warping(self) -> SamplingParams:
        """How p is made of the logits."""
        return replace(self.sampling, temperature=self.transfer_temperature) if self.is_everywhere else self.sampling


class Verify(NamedTuple):
    """Verifies ``draft`` by its target's ``logits`` [γ+1, V]; the answer is what `verdict` reads, on the device."""

    logits: Tensor
    draft: Draft
    how: How

    @property
    def kind(self) -> tuple[object, ...]:
        """Verifications of the same kind are computed together."""
        how = self.how
        ruled = how.warping.temperature > 0 and (how.rule, isinstance(how.strength, Bound))
        return how.is_greedy, how.is_everywhere, ruled, truncates(how.sampling, self.logits.shape[-1])

    @staticmethod
    def together(wishes: Sequence[Verify]) -> list[Tensor]:
        return in_groups(wishes, lambda each: each.kind, _verify)


class Decided(NamedTuple):
    """A verdict on the host: how many draft tokens were accepted, what the round emits, and what else was asked for."""

    num_accepted: int
    emitted: list[int]
    transferred: Transferred | None
    logprobs: list[Logprobs]


def verdict(values: NDArray[np.float64], draft: Draft, how: How) -> Decided:
    """The verdict on ``draft`` from the ``values`` that a `Verify` gave."""
    num_accepted, next_token = map(int, values[:2])
    values, transferred, logprobs = values[2:], None, []
    if isinstance(how.strength, Bound):
        size = len(Transferred._fields)
        transferred, values = Transferred(*values[:size].tolist()), values[size:]
    if how.num_logprobs is not None:
        for own, *top in values.reshape(len(draft.tokens) + 1, -1)[: num_accepted + 1].tolist():
            likely, ids = top[: len(top) // 2], map(int, top[len(top) // 2 :])
            logprobs.append(Logprobs(own, [(i, v) for i, v in zip(ids, likely, strict=True) if v > -np.inf]))
    return Decided(num_accepted, [*draft.tokens[:num_accepted], next_token], transferred, logprobs)


def _verify(wishes: Sequence[Verify]) -> list[Tensor]:
    """Verifies drafts of one kind."""
    how, logits = wishes[0].how, joined([each.logits for each in wishes])
    drafts = draft_rows([each.draft for each in wishes], logits.device, with_q=not (how.is_greedy or how.is_everywhere))
    if how.is_everywhere:
        found = _by_augmented_logits(wishes, logits, drafts)
    elif how.is_greedy:
        found = _Found(verify_chosen(drafts, logits.argmax(-1)))
    else:
        found = _by_rule(wishes, logits, drafts)
    verdicts = torch.stack(found.verdict, -1)  # [B, 2]
    numbers = verdicts.double()
    if found.chosen is not None:
        numbers = torch.cat([numbers, found.chosen.sums(found.verdict)], -1)
    laws = found.laws or [None] * len(wishes)
    return [
        row if each.how.num_logprobs is None else torch.cat([row, _logprobs(each, verdict, law)])
        for each, row, verdict, law in zip(wishes, numbers, verdicts, laws, strict=True)
    ]


def _by_rule(wishes: Sequence[Verify], logits: Tensor, drafts: DraftRows) -> _Found:
    """Sampled verdicts by one rule, and the laws of those whose log-probabilities are wanted."""
    hows, rule, device = [each.how for each in wishes], wishes[0].how.rule, logits.device
    params = _row_params(wishes, device)
    places = upload([(each.how.seed, each.draft.offset) for each in wishes], "int64", device)
    noise = Noise(places[:, 0], places[:, 1])
    reads_all = any(how.num_logprobs is not None or isinstance(how.strength, Bound) for how in hows)
    few = None if reads_all else warp_to_few(logits, params)
    if few is not None:
        return _Found(_verify_few(rule, drafts, *few, _strengths(hows, logits)[0], noise))
    target_probs = warp(logits, params)
    strength, chosen = _strengths(hows, drafts.scored(target_probs))
    of_some = device.type == "cpu" and params.truncate(logits.shape[-1])
    verdict = (_verify_possible if of_some else verify)(rule, drafts, target_probs, strength, noise)
    probs_of_each = target_probs.split([len(each.logits) for each in wishes])
    strength_of_each = strength.split([len(how.distributions) for how in hows])
    laws = [
        None if each.how.num_logprobs is None else _law(each, probs, its_strength)
        for each, probs, its_strength in zip(wishes, probs_of_each, strength_of_each, strict=True)
    ]
    return _Found(verdict, chosen, laws)


def _verify_possible(rule: Rule, drafts: DraftRows, target_probs: Tensor, strength: Tensor, noise: Noise) -> Verdict:
    """`verify` over the tokens that p or q of any row allow: all others stay impossible under every rule.

    After top-p these are some hundred, and a rule reads and writes its rows a dozen times.
    """
    possible = target_probs.amax(0) > 0
    possible[drafts.ids] = possible[drafts.tokens] = True
    ids = possible.nonzero().squeeze(-1)
    return verify(rule, _over(ids, drafts), target_probs.index_select(-1, ids), strength, noise, ids)


def _verify_few(
    rule: Rule, drafts: DraftRows, tokens: Tensor, probs: Tensor, strength: Tensor, noise: Noise
) -> Verdict:
    """The same where each row's p is given as ``tokens`` [N + B, k] and their ``probs``."""
    ids = torch.cat([tokens[probs > 0], drafts.ids.flatten(), drafts.tokens]).unique()
    places = torch.searchsorted(ids, tokens).clamp_max(len(ids) - 1)  # those of no probability may be anywhere
    target_probs = probs.new_zeros(len(probs), len(ids)).scatter_add_(-1, places, probs)
    return verify(rule, _over(ids, drafts), target_probs, strength, noise, ids)


def _over(ids: Tensor, drafts: DraftRows) -> DraftRows:
    """``drafts`` that name the columns of the tokens ``ids``, which are in ascending order."""
    return drafts._replace(tokens=torch.searchsorted(ids, drafts.tokens), ids=torch.searchsorted(ids, drafts.ids))


def _by_augmented_logits(wishes: Sequence[Verify], logits: Tensor, drafts: DraftRows) -> _Found:
    """Verdicts by a draw from the augmented logits, or their argmax, for each row. Each row has a q.

    A row's number belongs to its position, so a token does not depend on what was drafted. A draft token stands if it
    is the one that was drawn.
    """
    hows, device = [each.how for each in wishes], logits.device
    params = _row_params(wishes, device)
    target_probs = warp(logits, params)
    strength, chosen = _strengths(hows, target_probs)
    draft_probs = dense(*_padded_q(hows, device), logits.shape[-1])
    shift = hows[0].rule.shift(target_probs, draft_probs)
    augmented = augmented_logits(logits / params.temperature.to(logits.dtype), target_probs, shift, strength)
    if hows[0].is_greedy:
        return _Found(verify_chosen(drafts, augmented.argmax(-1)), chosen)
    counts = [len(each.logits) for each in wishes]
    rows = [
        (how.seed, each.draft.offset + i, how.sampling.temperature / how.transfer_temperature)
        for each, how, count in zip(wishes, hows, counts, strict=True)
        for i in range(count)
    ]
    seeds, positions, temperatures = zip(*rows, strict=True)
    law = tempered(augmented, upload(temperatures, "float64", device).unsqueeze(-1))
    noise = Noise(*upload([seeds, positions], "int64", device))
    keys = noise.keys(Purpose.NEXT, torch.zeros(len(rows), 1, dtype=torch.int64, device=device)).squeeze(-1)
    return _Found(verify_chosen(drafts, sample(law, keys)), chosen, law.split(counts))


def _row_params(wishes: Sequence[Verify], device: torch.device) -> RowParams:
    if len(wishes) == 1:
        return RowParams.of([wishes[0].how.warping], device)
    return RowParams.of([each.how.warping for each in wishes for _ in range(len(each.logits))], device)


def _strengths(hows: Sequence[How], scored: Tensor) -> tuple[Tensor, _ChosenStrength | None]:
    """η [N, 1] of the N positions with a q, of which ``scored`` [N, V] is p; and how it was chosen, if it was."""
    if isinstance(hows[0].strength, Bound):
        chosen = _ChosenStrength(hows, scored)
        return chosen.region.strength.float(), chosen
    given = [[how.strength] for how in hows for _ in how.distributions]
    return upload(given or np.zeros((0, 1)), "float32", scored.device), None


class _Found(NamedTuple):
    verdict: Verdict
    chosen: _ChosenStrength | None = None
    laws: Sequence[Tensor | None] = ()


class _ChosenStrength:
    """η of each position that has a q, for B verifications by one rule; ``scored`` [N, V] is p of these positions."""

    def __init__(self, hows: Sequence[How], scored: Tensor) -> None:
        device = scored.device
        counts = [len(how.distributions) for how in hows]
        places = [(b, step) for b, count in enumerate(counts) for step in range(count)]
        self._sequences, self._steps = upload(np.array(places).T, "int64", device)
        self._counts = upload(counts, "int64", device)
        most, confidence, before = upload([how.strength for how in hows], "float64", device).T
        ids, weights = _padded_q(hows, device)
        agreements = torch.zeros(len(hows), max(counts), dtype=torch.float64, device=device)
        agreements[self._sequences, self._steps] = torch.minimum(scored.gather(-1, ids), weights).double().sum(-1)
        self._agreement = running_agreement(before, agreements)
        most = (most * confidence)[self._sequences] * self._agreement[self._sequences, self._steps]
        draft_probs = dense(ids, weights, scored.shape[-1])
        self.region: Region = choose(
            hows[0].rule, scored, draft_probs, most.unsqueeze(-1), confidence[self._sequences].unsqueeze(-1)
        )

    def sums(self, found: Verdict) -> Tensor:
        """The numbers of each verification's `Transferred`: [B, 6]."""
        behind = torch.minimum(found.num_accepted + 1, self._counts).unsqueeze(-1)
        is_written = (self._steps <= found.num_accepted[self._sequences]).unsqueeze(-1)
        columns = torch.cat([torch.ones_like(self.region.bound), *self.region], -1) * is_written
        sums = columns.new_zeros(len(self._counts), columns.shape[-1]).index_add_(0, self._sequences, columns)
        return torch.cat([self._agreement.gather(-1, behind), sums], -1)


def _padded_q(hows: Sequence[How], device: torch.device) -> tuple[Tensor, Tensor]:
    """The q of all positions that have one, as ids and weights."""
    return padded([pairs for how in hows for pairs in how.distributions], device)


def _law(wish: Verify, target_probs: Tensor, strength: Tensor) -> Tensor:
    """The law [γ+1, V] of what ``wish`` emits, from its rows of p and its η [γ, 1]."""
    if not wish.draft.tokens:
        return target_probs
    draft_probs = dense(*padded(wish.draft.distributions, target_probs.device), target_probs.shape[-1])
    return output_law(wish.how.rule, draft_probs, target_probs, strength)


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
    top, ids = log_probs.topk(min(wish.how.num_logprobs or 0, log_probs.shape[-1]))
    return torch.cat([own.double(), top.double(), ids.double()], -1).flatten()
