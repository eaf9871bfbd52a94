"""What was computed of texts lately. It is found with the same salt alone: the time of a call tells nobody else."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from retrieval.chunking import Chunk, Tokenizer, split

_CUTS = 65_536  # that are remembered, of all texts; 16 bytes each


def digest(text: str, salt: str) -> bytes:
    """A name for `text` that another `salt` does not lead to."""
    key = hashlib.sha256(salt.encode()).digest()
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=32, key=key).digest()


class CutCache:
    """Cuts texts (`retrieval.chunking.split`). The next question about a document needs none of its tokens.

    Of the most recently used texts it remembers where they were cut, up to `size` cuts in all. Several threads may call
    it.
    """

    def __init__(self, tokenizer: Tokenizer, size: int = _CUTS) -> None:
        self._tokenizer, self._left = tokenizer, size
        self._cuts: OrderedDict[tuple[bytes, int], NDArray[np.int64]] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def split(self, text: str, max_tokens: int, salt: str = "") -> Iterator[Chunk]:
        """Raises ValueError when `max_tokens` is less than 1."""
        name = digest(text, salt), max_tokens
        with self._lock:
            if name in self._cuts:
                self._cuts.move_to_end(name)
            known = self._cuts.get(name)
        if known is not None:
            start = 0
            for end, num_tokens in known.tolist():
                yield Chunk(start, end, text[start:end], num_tokens)
                start = end
            return
        cuts = []
        for chunk in split(text, max_tokens=max_tokens, tokenizer=self._tokenizer):
            cuts.append((chunk.end, chunk.num_tokens))
            yield chunk
        if len(cuts) > 1:  # a single chunk is tokenised in no time
            self._remember(name, np.array(cuts))

    def _remember(self, name: tuple[bytes, int], cuts: NDArray[np.int64]) -> None:
        with self._lock:
            if name in self._cuts:  # another thread was as fast
                return
            self._cuts[name] = cuts
            self._left -= len(cuts)
            while self._left < 0:
                self._left += len(self._cuts.popitem(last=False)[1])


class VectorCache:
    """The vectors of the `size` most recently used texts, by the texts' names (`digest`).

    They lie in one array. As separate small arrays between the large ones of each pass they would fragment the heap:
    the allocator could neither reuse nor return more and more memory.
    """

    def __init__(self, size: int, dimension: int) -> None:
        self._vectors = np.empty((size, dimension), dtype=np.float32)  # uses memory as it is written
        self._rows: OrderedDict[bytes, int] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()

    def recall(self, names: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """Return copies of the cached vectors."""
        with self._lock:
            return {name: self._vectors[self._rows[name]].copy() for name in names if name in self._rows}

    def remember(self, vectors: Mapping[bytes, NDArray[np.float32]]) -> None:
        with self._lock:
            for name, vector in vectors.items():
                if name not in self._rows:
                    is_full = len(self._rows) == len(self._vectors)
                    self._rows[name] = self._rows.popitem(last=False)[1] if is_full else len(self._rows)
                    self._vectors[self._rows[name]] = vector
                self._rows.move_to_end(name)
