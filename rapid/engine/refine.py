"""Refines drafts: a target over a part of its cache makes its own of them (`rapid.drafters.triforce`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rapid.engine.grouping import in_groups, joined
from rapid.kernels.transfer import upload
from rapid.sampling.noise import Noise
from rapid.sampling.params import SamplingParams
from rapid.sampling.row_params import RowParams
from rapid.speculation.draft import Draft
from rapid.speculation.drawing import confidences, truncated
from rapid.speculation.rows import dense, draft_rows
from rapid.speculation.verification import LOSSLESS, verify, verify_chosen


class Refine(NamedTuple):
    """Verifies ``draft``, losslessly, by the truncated distributions of ``logits`` [n+1, V], which become the new q.

    So the accepted tokens and the one that follows are a draft from q, whoever proposed the first of them. The answer
    has the numbers of a `Verdict` and, for each row, those of a `DrawnToken`, on the device (`refined_tokens`).
    """

    logits: Tensor
    draft: Draft
    sampling: SamplingParams
    draft_top_k: int
    seed: int

    @staticmethod
    def together(wishes: Sequence[Refine]) -> list[Tensor]:
        return in_groups(wishes, lambda each: each.sampling.temperature > 0 and each.draft_top_k, _refine)


def _refine(wishes: Sequence[Refine]) -> list[Tensor]:
    """Refines drafts with one ``draft_top_k``, or greedily."""
    logits = joined([each.logits for each in wishes])
    is_greedy = wishes[0].sampling.temperature == 0
    drafts = draft_rows([each.draft for each in wishes], logits.device, with_q=not is_greedy)
    if is_greedy:
        ids = weights = logits[:, :0]
        found = verify_chosen(drafts, logits.argmax(-1))
    else:
        params = RowParams.of([each.sampling for each in wishes for _ in range(len(each.logits))], logits.device)
        ids, weights = truncated(logits, params, wishes[0].draft_top_k)
        places = upload([(each.seed, each.draft.offset) for each in wishes], "int64", logits.device)
        noise = Noise(places[:, 0], places[:, 1])
        found = verify(LOSSLESS, drafts, dense(ids, weights, logits.shape[-1]), 0.0, noise)
    tokens = upload([token for each in wishes for token in (*each.draft.tokens, 0)], "int64", logits.device)
    tokens = tokens.index_copy(0, drafts.emitting(found.num_accepted), found.next_token)
    columns = (tokens.unsqueeze(-1), confidences(logits, tokens).unsqueeze(-1), ids, weights)
    rows = torch.cat([column.double() for column in columns], -1).split([len(each.logits) for each in wishes])
    counts = found.num_accepted.double().split(1)
    return [torch.cat([count, own.flatten()]) for count, own in zip(counts, rows, strict=True)]
