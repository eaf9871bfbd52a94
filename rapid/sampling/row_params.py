"""The sampling parameters of many rows of logits, each with its own, as a device needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rapid.kernels.transfer import upload
from rapid.sampling.params import SamplingParams


class RowParams(NamedTuple):
    """The parameters ``rows`` of R rows, or of one for all rows; ``columns`` float64 [R, 4] has them on the device."""

    rows: Sequence[SamplingParams]
    columns: Tensor

    @classmethod
    def of(cls, rows: Sequence[SamplingParams], device: torch.device) -> RowParams:
        values = [(row.temperature, row.top_k, row.top_p, row.min_p) for row in rows]
        return cls(rows, upload(values, "float64", device))

    @property
    def temperature(self) -> Tensor:
        return self.columns[:, 0:1]

    @property
    def top_k(self) -> Tensor:
        return self.columns[:, 1:2].long()

    @property
    def top_p(self) -> Tensor:
        return self.columns[:, 2:3]

    @property
    def min_p(self) -> Tensor:
        return self.columns[:, 3:4]

    def truncate(self, vocab_size: int) -> bool:
        """Whether any row leaves out tokens of a vocabulary of ``vocab_size``."""
        return any(truncates(row, vocab_size) for row in self.rows)


def truncates(params: SamplingParams, vocab_size: int) -> bool:
    """Whether ``params`` may leave out tokens of a vocabulary of ``vocab_size``."""
    return 0 < params.top_k < vocab_size or params.top_p < 1 or params.min_p > 0
