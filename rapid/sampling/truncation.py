"""Top-k, top-p and min-p: each keeps the tokens from some probability on, and the kept ones are renormalised.

On a CPU the lowest kept probability is searched for, and the vocabulary is not sorted. On other devices it is sorted,
for all rows at once: that costs less there than the host's wait for the search.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rapid.sampling.params import SamplingParams
from rapid.sampling.row_params import RowParams, truncates

Floats = NDArray[Any]  # float32 or float64

_BLOCK = 64  # neighbouring tokens whose maximum stands for them in a search
_LIKELY = 48  # the nucleus most often ends above this one of the largest maxima
_FEW = 1024  # values that are sorted


def truncate(probs: Tensor, params: RowParams) -> Tensor:
    """The rows ``probs`` [..., V], which sum to 1, after top-k, top-p and min-p in that order; may overwrite ``probs``.

    Top-k keeps all tokens as likely as the k-th. Top-p keeps the smallest set of most likely tokens whose share of the
    rest reaches p, and at least one; of equally likely tokens it keeps those with the larger ids. Min-p keeps the
    tokens with at least that share of the largest probability.
    """
    size = probs.shape[-1]
    if not params.truncate(size):
        return probs
    if probs.device.type != "cpu":
        return by_sorting(probs, params)
    if size % _BLOCK:
        probs = torch.nn.functional.pad(probs, (0, -size % _BLOCK))
    rows = _rows(probs)
    for row, its in zip(rows, params.rows if len(params.rows) > 1 else [params.rows[0]] * len(rows), strict=True):
        if not truncates(its, size):
            continue
        floor, surplus = _lowest_kept(row, its, size)
        torch.threshold_(row.values, _below(floor), 0.0)
        if surplus:
            row.blocks.ravel()[np.flatnonzero(row.blocks.ravel() == floor)[:surplus]] = 0
        row.values.div_(row.values.sum())
    return probs[..., :size]


def by_sorting(probs: Tensor, params: RowParams) -> Tensor:
    """`truncate`, for all rows at once and without reading anything on the host.

    A row whose ``params`` leave out nothing keeps all tokens that are possible.
    """
    ascending, order = probs.sort(dim=-1, stable=True)
    size, top_k = probs.shape[-1], params.top_k
    kth = torch.where((top_k > 0) & (top_k < size), size - top_k, 0)
    keep = ascending >= ascending.gather(-1, kth.expand(*ascending.shape[:-1], 1))
    mass_up_to = (ascending * keep).cumsum(-1, dtype=torch.float64)
    keep &= mass_up_to > (1 - params.top_p) * mass_up_to[..., -1:]
    keep[..., -1] = True
    keep &= ascending >= params.min_p.to(probs.dtype) * ascending[..., -1:]
    probs = probs * torch.empty_like(keep).scatter_(-1, order, keep)
    return probs / probs.sum(-1, keepdim=True)


def truncate_largest(probs: Tensor, params: RowParams) -> Tensor:
    """`truncate` of the k largest probabilities of each row, in descending order [R, k]; not renormalised.

    Without ``params.rows`` only the device knows the parameters, and nothing is left out that may be asked for.
    """
    unknown = not params.rows
    cut_top_k, cut_top_p, cut_min_p = (
        unknown or any(row.top_k for row in params.rows),
        unknown or any(row.top_p < 1 for row in params.rows),
        unknown or any(row.min_p for row in params.rows),
    )
    mass: Tensor | float = 1.0
    if cut_top_k:
        size, top_k = probs.shape[-1], params.top_k
        last = torch.where(top_k > 0, top_k, size).clamp_max(size) - 1
        probs = probs * (probs >= probs.gather(-1, last.expand(len(probs), 1)))
        mass = torch.where(top_k > 0, probs.sum(-1, keepdim=True, dtype=torch.float64), 1.0)
    likeliest = probs[:, :1]
    if cut_top_p:
        mass_before = probs.cumsum(-1, dtype=torch.float64) - probs
        probs = probs * (mass_before < params.top_p * mass)
    if cut_min_p:
        probs = probs * (probs >= params.min_p.to(probs.dtype) * likeliest)
    return probs


class _Row(NamedTuple):
    """One row: ``values`` [V], the same memory as ``blocks`` [V/64, 64], their maxima, and these in order [V/64]."""

    values: Tensor
    blocks: Floats
    peaks: Floats
    ordered: Floats

    def at_least(self, value: Any) -> Floats:
        """The values from ``value`` on."""
        blocks = self.blocks[self.peaks >= value]
        values: Floats = blocks[blocks >= value]
        return values

    def mass_above(self, value: Any) -> float:
        return float(torch.threshold(self.values, float(value), 0.0).sum())


def _rows(probs: Tensor) -> list[_Row]:
    blocks = probs.view(-1, probs.shape[-1] // _BLOCK, _BLOCK)
    peaks = blocks.amax(-1).numpy()
    return list(map(_Row, blocks.flatten(1), blocks.numpy(), peaks, np.sort(peaks)))


def _below(value: Any) -> float:
    """The next smaller number of the value's type."""
    return float(np.nextafter(value, value.dtype.type(-1)))


def _lowest_kept(row: _Row, params: SamplingParams, size: int) -> tuple[Any, int]:
    """(the lowest of the row's first ``size`` values that is kept, how many tokens of exactly that value are not)."""
    floor, surplus = row.peaks.dtype.type(0), 0
    if 0 < params.top_k < size:
        floor = _kth_largest(row, params.top_k)
    if params.top_p < 1:
        floor, surplus = _nucleus(row, floor, params.top_p)
    if params.min_p > 0 and (share := params.min_p * row.ordered[-1]) > floor:
        floor, surplus = share, 0
    return floor, surplus


def _kth_largest(row: _Row, k: int) -> Any:
    # The k largest maxima are values, so the k-th largest value is at least the least of them.
    values = row.at_least(row.ordered[-k]) if k <= len(row.ordered) else row.blocks.ravel()
    return np.partition(values, len(values) - k)[len(values) - k]


def _nucleus(row: _Row, lowest: Any, top_p: float) -> tuple[Any, int]:
    """Of the values from ``lowest`` on, the set that top-p keeps: as `_lowest_kept` returns it."""
    total = float(row.at_least(lowest).sum(dtype=np.float64)) if lowest else 1.0
    target, above = top_p * total, 0.0
    likely = max(lowest, row.ordered[-min(_LIKELY, len(row.ordered))])
    values = row.at_least(likely)
    mass = float(values.sum(dtype=np.float64))
    if mass < target and likely > lowest:
        # Values up to this one have together at most half of the mass that may be left out.
        unlikely = max(lowest, lowest.dtype.type((1 - top_p) * total / (2 * row.blocks.size)))
        low, high, above = _bracket(row, target, _below(unlikely), total, _below(likely), mass)
        values = row.blocks[(row.blocks > low) & (row.blocks <= high)]
    descending = np.sort(values)[::-1]
    reached = above + descending.cumsum(dtype=np.float64) >= target
    last = int(reached.argmax()) if reached[-1] else len(reached) - 1
    return descending[last], int(np.count_nonzero(descending >= descending[last])) - last - 1


def _bracket(
    row: _Row, target: float, low: float, mass_low: float, high: float, mass_high: float
) -> tuple[float, float, float]:
    """Closer bounds (low, high, mass above high) of the value where the mass of larger values passes ``target``.

    ``mass_low`` is the mass above ``low``, ``mass_high`` that above ``high``. A probe between them costs one pass over
    the row. The search ends when at most 1,024 values can lie between, or when all of them are equal.
    """
    exact = row.peaks.dtype.type
    while (mass_low - mass_high) / low > _FEW:
        share = min(0.9, max(0.1, (target - mass_high) / (mass_low - mass_high)))
        probe = float(exact(high * (low / high) ** share))
        if not low < probe < high:
            break
        mass = row.mass_above(probe)
        if mass >= target:
            low, mass_low = probe, mass
        else:
            high, mass_high = probe, mass
    return low, high, mass_high
