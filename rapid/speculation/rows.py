"""The drafts of many sequences as tensors on the device, for one verification of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rapid.kernels.transfer import upload
from rapid.speculation.draft import Draft, Pairs


class DraftRows(NamedTuple):
    """The drafts of B sequences: N tokens in one column, whatever the lengths of the drafts, and their truncated q.

    The target has γ + 1 rows for each sequence, one below the other: N + B rows. ``tokens[i]`` is judged by row
    ``rows[i]``; it is the token at place ``steps[i]`` of the draft of sequence ``sequences[i]``. Its q gives ``ids[i]``
    the probabilities ``weights[i]`` [N, k], and 0 to all other tokens; a padding has weight 0. Sequence b's draft has
    ``lengths[b]`` tokens, the first one being token ``firsts[b]``. ``longest`` is the largest length, on the host; all
    else is on the device.
    """

    tokens: Tensor
    rows: Tensor
    steps: Tensor
    sequences: Tensor
    ids: Tensor
    weights: Tensor
    lengths: Tensor
    firsts: Tensor
    longest: int

    def scored(self, target_rows: Tensor) -> Tensor:
        """Those of ``target_rows`` [N + B, ...] that judge a token: [N, ...]."""
        return target_rows[:-1] if len(self.lengths) == 1 else target_rows.index_select(0, self.rows)

    def probs_of_tokens(self) -> Tensor:
        """q of each draft token, [N]."""
        return self.weights.masked_fill(self.ids != self.tokens.unsqueeze(-1), 0).sum(-1)

    def num_accepted(self, accepts: Tensor) -> Tensor:
        """[B], how many tokens stand before the first that ``accepts`` (bool [N]) refuses; all if it refuses none."""
        refused = torch.where(accepts, self.longest, self.steps)
        return self.lengths.scatter_reduce(0, self.sequences, refused, "amin")

    def emitting(self, num_accepted: Tensor) -> Tensor:
        """The row [B] of each sequence that gives the token behind ``num_accepted`` [B] others."""
        return self.firsts + torch.arange(len(self.lengths), device=self.firsts.device) + num_accepted


def draft_rows(drafts: Sequence[Draft], device: torch.device, *, with_q: bool) -> DraftRows:
    """The rows of all ``drafts``, for one call of `verify`; without q where tokens are chosen whatever was drafted."""
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
        ids, weights = padded([pair for draft in drafts for pair in draft.distributions], device)
    tokens, rows, steps, sequences = upload(columns, "int64", device).unbind()
    return DraftRows(tokens, rows, steps, sequences, ids, weights, counts, starts, max(lengths))


def padded(pairs: Sequence[Pairs], device: torch.device) -> tuple[Tensor, Tensor]:
    """The ids and weights of ``pairs`` as rows [n, k]."""
    sizes = np.array([len(ids) for ids, _ in pairs])
    is_filled = np.arange(sizes.max()) < sizes[:, None]
    ids, weights = np.zeros(is_filled.shape, np.int64), np.zeros(is_filled.shape, np.float32)
    ids[is_filled], weights[is_filled] = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return upload(ids, "int64", device), upload(weights, "float32", device)


def dense(ids: Tensor, weights: Tensor, vocab_size: int) -> Tensor:
    """A truncated q as rows over the vocabulary: ``ids``, ``weights`` [n, k] to [n, V]."""
    # scatter_ would let a padding overwrite the weight of token 0.
    return weights.new_zeros(len(ids), vocab_size).scatter_add_(-1, ids, weights)
