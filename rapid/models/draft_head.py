"""The output layer over a draft vocabulary: some rows of a model's head, gathered once for each sequence."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rapid.kernels.cpu.linear import CompiledLinear
from rapid.kernels.transfer import upload
from rapid.models.draft_vocabulary import DraftVocabulary


class DraftHead:
    """Logits [rows, N] over ``vocabulary`` from hidden states [rows, hidden]; ``ids`` [N] are the columns' tokens.

    ``rows`` is the layer that gives the logits.
    """

    def __init__(self, head: CompiledLinear, vocabulary: DraftVocabulary) -> None:
        self.vocabulary, self._head = vocabulary, head
        self.ids: Tensor = upload(vocabulary.ids, "int64", torch.device("cpu"))
        self.rows = head.of_outputs(self.ids)

    def __call__(self, x: Tensor) -> Tensor:
        return self.rows(x)

    def add(self, tokens: Iterable[int]) -> bool:
        """Gives ``tokens`` columns where they have none; whether the vocabulary changed."""
        columns = self.vocabulary.add(tokens)
        if columns:
            places = torch.tensor(columns)
            self.ids[places] = torch.from_numpy(self.vocabulary.ids[columns])
            self.rows.copy_outputs(places, self._head, self.ids[places])
        return bool(columns)
