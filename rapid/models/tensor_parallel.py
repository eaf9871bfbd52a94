"""Tensor parallelism: several processes compute one model's passes together, each with its share of every layer.

transformers' plan says how the weights are cut, and transformers loads only each rank's share. The first rank has the
engine. It broadcasts the pages and tokens of each pass to the other ranks. They hold KV pools of the same shape, for
their own heads, and compute the same pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rapid.errors import EngineLost
from rapid.kernels.interface import BatchEntry
from rapid.kernels.transfer import download
from rapid.kv_cache.pool import KVPool
from rapid.kv_cache.table import PageTable
from rapid.models.info import RankPlacement

if TYPE_CHECKING:
    from rapid.models.model import Model

_JOIN_TIMEOUT = timedelta(minutes=5)  # until all ranks have joined; models are loaded afterwards
_PASS_TIMEOUT = timedelta(minutes=2)  # no pass takes longer, unless a rank is gone
_NEXT_PASS_TIMEOUT = timedelta(days=365)  # a rank may wait that long for the next pass


class Group:
    """This process's rank among the ranks of one model.

    Raises:
        EngineLost: the other ranks did not come in time.
    """

    def __init__(self, placement: RankPlacement, device: str) -> None:
        self.placement = placement
        backend = "nccl" if device.startswith("cuda") else "gloo"
        try:
            dist.init_process_group(
                backend,
                init_method=f"tcp://{placement.address}",
                rank=placement.rank,
                world_size=placement.num_ranks,
                timeout=_JOIN_TIMEOUT,
            )
            # The broadcast messages are host objects: over gloo, they never wait for the device.
            self._control = dist.new_group(backend="gloo", timeout=_NEXT_PASS_TIMEOUT)
            self._compute = dist.new_group(backend=backend, timeout=_PASS_TIMEOUT)
        except RuntimeError as error:
            raise EngineLost(
                f"rank {placement.rank} did not meet the others at {placement.address}: {error}"
            ) from error

    def share(self, size: int) -> slice:
        """This rank's part of ``size`` rows, cut as transformers does: equal parts, the last may be smaller."""
        part = -(-size // self.placement.num_ranks)
        return slice(min(size, self.placement.rank * part), min(size, (self.placement.rank + 1) * part))

    def plan(self) -> Any:
        """transformers' plan for these ranks, for its `from_pretrained`."""
        from transformers.distributed.configuration_utils import DistributedConfig  # not in older releases

        return DistributedConfig(tp_size=self.placement.num_ranks, tp_plan="auto")

    def wait(self) -> None:
        """Waits until all ranks are here, without a deadline."""
        dist.barrier(group=self._control)

    def broadcast(self, message: object) -> None:
        """Sends ``message`` from the first rank to all others."""
        dist.broadcast_object_list([message], src=0, group=self._control)

    def receive(self) -> Any:
        """Waits for the first rank's next message."""
        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, src=0, group=self._control)
        return heard[0]

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x``; it overwrites ``x`` if that is contiguous."""
        x = x.contiguous()  # gloo would silently sum the memory between its rows
        dist.all_reduce(x, group=self._compute)
        return x

    def all_gather(self, x: Tensor, size: int) -> Tensor:
        """All ranks' parts of the last dimension, ``size`` in all."""
        part = -(-size // self.placement.num_ranks)
        parts = [x.new_empty((*x.shape[:-1], part)) for _ in range(self.placement.num_ranks)]
        dist.all_gather(parts, F.pad(x, (0, part - x.shape[-1])).contiguous(), group=self._compute)
        return torch.cat(parts, -1)[..., :size]


@dataclass(frozen=True)
class NewPool:
    """The first rank has made a KV pool of ``budget_bytes``."""

    budget_bytes: int


@dataclass(frozen=True)
class Pass:
    """The first rank begins a pass: for each sequence its page table, new tokens, and rows of logits.

    A page table is (pages, filled length, tokens left out, slots to keep), as in `PageTable`.
    """

    parts: tuple[tuple[tuple[list[int], int, int, int], list[int], int], ...]

    @classmethod
    def of(cls, entries: Sequence[BatchEntry]) -> Pass:
        """Waits for the device once, if there are tokens on it."""
        on_device = [tokens for _, tokens, _ in entries if isinstance(tokens, Tensor)]
        read = iter(download(torch.cat(on_device)).tolist() if on_device else [])
        return cls(
            tuple(
                (
                    (table.pages, table.length, table.num_left_out, table.num_kept),
                    list(islice(read, len(tokens))) if isinstance(tokens, Tensor) else list(tokens),
                    num_rows,
                )
                for table, tokens, num_rows in entries
            )
        )

    def entries(self, pool: KVPool) -> list[BatchEntry]:
        """The same batch over this rank's ``pool``."""
        return [
            BatchEntry(PageTable(pool, pages, length, num_left_out=left_out, num_kept=kept), tokens, rows)
            for (pages, length, left_out, kept), tokens, rows in self.parts
        ]


def local(parameter: Tensor) -> Tensor:
    """This rank's share of a parameter that transformers has cut, or all of a parameter that it has not."""
    own = parameter.detach()
    return own.to_local() if hasattr(own, "to_local") else own


def follow(model: Model) -> None:
    """On every rank but the first: computes this rank's share of the first rank's passes, until the process ends.

    Raises:
        EngineLost: a rank is gone.
    """
    assert model.group is not None
    pool: KVPool | None = None
    while True:
        with together(model.info.name):
            message = model.group.receive()
            if isinstance(message, NewPool):
                pool = model.attention.pool(model.layout, message.budget_bytes)
            else:
                assert pool is not None
                model.compute(message.entries(pool))


@contextmanager
def together(name: str) -> Iterator[None]:
    """Raises any failure of the ranks of model ``name`` as EngineLost.

    gloo and NCCL report a lost rank in many ways, and after any error the ranks no longer agree on the next pass.
    """
    try:
        yield
    except Exception as error:
        raise EngineLost(f"{name}: what several ranks do together failed: {error}") from error
