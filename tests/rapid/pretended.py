"""A CUDA device that is not there: its attention is SDPA over pages, and its graphs are calls."""

from collections.abc import Callable

import pytest
from torch import Tensor

from rapid.kernels.cuda.attention import PagedAttention, PagedBatch, gathered_sdpa, recordable
from rapid.models import model

FAILS = "operation not permitted when stream is capturing"


@recordable
def pretended_kernel(query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scaling: float) -> Tensor:
    return gathered_sdpa(query, keys, values, batch, scaling)


class PretendedRecorder:
    """Keeps calls instead of graphs. Recording number ``fails_at`` fails; each takes ``bytes_each``."""

    def __init__(self) -> None:
        self.attention = PagedAttention(pretended_kernel, page_size=16)
        self.num_replays = self.num_recorded = self.bytes_each = 0
        self.fails_at: int | None = None

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        if self.num_recorded == self.fails_at:
            raise RuntimeError(FAILS)
        run()
        self.num_recorded += 1

        def replay() -> None:
            self.num_replays += 1
            run()

        return replay

    def bytes_used(self) -> int:
        return self.num_recorded * self.bytes_each


def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> PretendedRecorder:
    """Makes models with the recorder's ``attention`` record their passes with it."""
    recorder = PretendedRecorder()
    monkeypatch.setattr(model, "recorder_of", lambda device: recorder)
    return recorder
