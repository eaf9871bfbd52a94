"""BM25 as sparse vectors, for text in any language. Qdrant multiplies the query's terms by their IDF.

A term is the beginning of a word, which serves as its stem in most languages with letters: McNamee and Mayfield
(Information Retrieval 7, 2004) found that short prefixes and character n-grams need no knowledge of the language. In
scripts that put no spaces between words (Chinese, Japanese, Thai, ...), and in Korean, whose words carry particles, the
terms are pairs of neighbouring characters.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_BGE_M3_FILES = ("colbert_linear.pt", "sparse_linear.pt")
_PREFIX = 5  # characters; numbers are not shortened
_K1, _B = 1.2, 0.75
# Python's \w leaves out the marks that belong to letters: accents, vowel points, and the vowels of Indian scripts.
_MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff"
_UNSPACED = (
    "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_RUN = re.compile(rf"(?P<unspaced>[{_UNSPACED}]+)|(?:[^\W_{_UNSPACED}]|[{_MARKS}])+")


class SparseVector(NamedTuple):
    """The entries of a vector that are not 0: `values[i]` stands at `indices[i]`; indices ascend, below 2³²."""

    indices: NDArray[np.uint32]
    values: NDArray[np.float32]


def terms(text: str) -> list[str]:
    """The terms of `text`, in order, repeated where they repeat."""
    found: list[str] = []
    for run in _RUN.finditer(unicodedata.normalize("NFKC", text).casefold()):
        word = run.group()
        if run.lastgroup:
            found += [word[i : i + 2] for i in range(max(1, len(word) - 1))]
        else:
            found.append(word[:_PREFIX] if word[0].isalpha() else word)
    return found


def bm25_passages(texts: Sequence[str]) -> list[SparseVector]:
    """A vector for each text: tf·(k₁ + 1) / (tf + k₁·(1 − b + b·length / mean length)) at each of its terms."""
    counts = [Counter(terms(text)) for text in texts]
    lengths = [count.total() for count in counts]
    mean = max(1.0, sum(lengths) / max(1, len(lengths)))
    vectors = []
    for count, length in zip(counts, lengths, strict=True):
        norm = _K1 * (1 - _B + _B * length / mean)
        vectors.append(sparse({_index(t): tf * (_K1 + 1) / (tf + norm) for t, tf in count.items()}))
    return vectors


def bm25_query(text: str) -> SparseVector:
    """1 at each term of the query."""
    return sparse(dict.fromkeys(map(_index, terms(text)), 1.0))


def weighs_words(folder: Path) -> bool:
    """Whether the embedding model in `folder` is BGE-M3, whose own weights take BM25's place."""
    return all((folder / name).is_file() for name in _BGE_M3_FILES)


def sparse(weights: dict[int, float]) -> SparseVector:
    """The vector with these `weights` by index."""
    indices = np.fromiter(weights.keys(), dtype=np.uint32, count=len(weights))
    values = np.fromiter(weights.values(), dtype=np.float32, count=len(weights))
    order = np.argsort(indices)
    return SparseVector(indices[order], values[order])


@lru_cache(maxsize=65_536)
def _index(term: str) -> int:
    return zlib.crc32(term.encode("utf-8", "replace"))
