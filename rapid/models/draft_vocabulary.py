"""The draft vocabulary: the tokens that one sequence's drafts are drawn from, so that a drafter's head is short.

A drafter reads its whole output layer for every token, and most of the rows are of words that this document and this
model never write (FR-Spec, arXiv 2502.14856). Here q is a distribution over N tokens: those of the prompts, the
frequent ones of the language, and those that the output has brought. Every verification rule takes any q, so its law
holds. A token outside is never drafted, and comes from the target.

A tokenizer of byte pairs numbers its tokens in the order of the merges, the most frequent first. So the smallest ids
are the frequent tokens of what the tokenizer was made from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

import numpy as np

Size = int | Literal["auto", "full"]

STEP = 64  # sizes are multiples of it: a kernel multiplies that many outputs at a time
_LEAST = 8192  # below this a part of the vocabulary saves less than it loses
_SHARE = 6  # auto: one token in so many
_CHANGING = 8  # one column in so many is kept for tokens that the output brings


def num_columns(size: Size, vocab_size: int) -> int | None:
    """N for a model with ``vocab_size`` tokens; None for all of them."""
    if size == "full":
        return None
    wanted = max(_LEAST, vocab_size // _SHARE) if size == "auto" else size
    columns = -(-wanted // STEP) * STEP
    return columns if columns < vocab_size else None


def by_frequency(tokens: Iterable[int]) -> tuple[int, ...]:
    """Each of ``tokens`` once, the most frequent first."""
    return tuple(token for token, _ in Counter(tokens).most_common())


class DraftVocabulary:
    """``ids`` int64 [N]: the token of each column. ``columns`` int64 [V]: the column of each token, or -1.

    The first of ``wanted`` tokens have a column, and the smallest ids have the other columns. All depends on the
    request alone, so that a seed repeats its text.
    """

    def __init__(self, size: int, vocab_size: int, wanted: Iterable[int]) -> None:
        first = list(dict.fromkeys(wanted))[: size - size // _CHANGING]
        is_free = np.ones(vocab_size, bool)
        is_free[first] = False
        self.ids = np.concatenate([np.array(first, np.int64), np.flatnonzero(is_free)[: size - len(first)]])
        self.columns = np.full(vocab_size, -1, np.int64)
        self.columns[self.ids] = np.arange(size)
        self._next = size - 1

    def add(self, tokens: Iterable[int]) -> list[int]:
        """Gives ``tokens`` columns, in place of the largest ids; returns the columns that changed."""
        size, changed = len(self.ids), []
        for token in tokens:
            if self.columns[token] < 0:
                column = self._next
                self.columns[self.ids[column]] = -1
                self.ids[column], self.columns[token] = token, column
                changed.append(column)
                self._next = column - 1 if column > size - size // _CHANGING else size - 1
        return changed
