"""What many tasks want at once: in groups that are computed together, over rows that lie one below the other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Wish = TypeVar("Wish")
Answer = TypeVar("Answer")


def in_groups(
    wishes: Sequence[Wish], kind: Callable[[Wish], Hashable], compute: Callable[[Sequence[Wish]], Sequence[Answer]]
) -> list[Answer]:
    """The answers of ``compute`` to each group of ``wishes`` of the same ``kind``, in the order of the wishes."""
    groups: dict[Hashable, list[int]] = {}
    for i, wish in enumerate(wishes):
        groups.setdefault(kind(wish), []).append(i)
    answers: dict[int, Answer] = {}
    for members in groups.values():
        answers.update(zip(members, compute([wishes[i] for i in members]), strict=True))
    return [answers[i] for i in range(len(wishes))]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """``parts``, one below the other. If they lie so in memory, as the rows of one pass do, nothing is copied."""
    first, end = parts[0], parts[0].storage_offset()
    memory = first.untyped_storage()._cdata
    for part in parts:
        if part.storage_offset() != end or part.untyped_storage()._cdata != memory or not part.is_contiguous():
            return torch.cat(list(parts))
        end += part.numel()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
