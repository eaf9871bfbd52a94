"""A datastore in a folder that several processes may share: texts come and go by name.

    <segment>.npy    tokens and suffixes, uint32 [2, n], which readers map into memory
    <segment>.json   its texts, the tokenizer's fingerprint; a segment counts from when this file is there
    lock             held while texts are added or removed

A segment never changes. Adding a text writes a new one, which takes in those of up to twice its size: so there are few,
and each token is sorted a few times. Removing a text writes the segments that had it anew.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rapid.datastore.search import SEPARATOR, Segment, Tokens, suffix_array
from rapid.errors import ModelFileError, ModelMismatch

MAX_SEGMENT_TOKENS = 2**22  # sorting them takes seconds, and 32 bytes of memory for each
_FORMAT = 1


@dataclass(frozen=True)
class Text:
    """A text, or a piece of one, of ``num_tokens`` tokens. It goes when its ``name`` or one of ``sources`` is removed.

    ``added`` is in seconds since the epoch.
    """

    name: str
    num_tokens: int
    added: float
    sources: tuple[str, ...] = ()

    def is_of(self, name: str) -> bool:
        return name == self.name or name in self.sources


class FolderInfo(NamedTuple):
    """What a datastore holds, and the fingerprint of the tokenizer that it is for."""

    tokenizer: str
    num_texts: int
    num_tokens: int
    num_segments: int
    num_bytes: int


@dataclass(frozen=True)
class _Stored:
    """A segment on the disk."""

    path: Path  # of its description
    tokenizer: str
    texts: tuple[Text, ...]

    @property
    def num_tokens(self) -> int:
        return sum(text.num_tokens for text in self.texts)

    @property
    def arrays(self) -> Path:
        return self.path.with_suffix(".npy")

    @cached_property
    def segment(self) -> Segment:
        return Segment(*np.load(self.arrays, mmap_mode="r").view(np.ndarray))

    def each(self) -> Iterator[tuple[Text, Tokens]]:
        """Its texts with their tokens."""
        start = 0
        for text in self.texts:
            yield text, self.segment.tokens[start : start + text.num_tokens]
            start += text.num_tokens + 1


class DatastoreFolder:
    """The datastore in ``path``, which the first text creates, for the tokenizer with this ``fingerprint``.

    Args:
        fingerprint: `rapid.text.tokenizer.fingerprint`; None where texts are only named or removed.
        max_segment_tokens: a larger segment is not made, and a longer text is cut.
    """

    def __init__(
        self, path: Path, fingerprint: str | None = None, *, max_segment_tokens: int = MAX_SEGMENT_TOKENS
    ) -> None:
        self.path, self._fingerprint, self._max_segment_tokens = path, fingerprint, max_segment_tokens
        self._known: dict[Path, _Stored] = {}

    def segments(self) -> list[Segment]:
        """All segments, mapped into memory.

        Raises:
            ModelFileError: a file is no datastore's.
            ModelMismatch: the datastore was made for another tokenizer.
        """
        segments = []
        for stored in self._fitting():
            try:
                segments.append(stored.segment)
            except FileNotFoundError:  # removed since: what stays of it is in a segment of the next call
                continue
            except (ValueError, EOFError, OSError) as error:
                raise ModelFileError(f"{stored.arrays} cannot be read: {error}; build the datastore anew") from error
        return segments

    def texts(self) -> list[Text]:
        """All texts; a text that was cut is several."""
        return [text for stored in self._stored() for text in stored.texts]

    def info(self) -> FolderInfo:
        """What the folder holds. Raises ModelFileError where a file is no datastore's."""
        stored, texts = self._stored(), self.texts()
        return FolderInfo(
            tokenizer=", ".join(sorted({each.tokenizer for each in stored})),
            num_texts=len({text.name for text in texts}),
            num_tokens=sum(text.num_tokens for text in texts),
            num_segments=len(stored),
            num_bytes=sum(file.stat().st_size for each in stored for file in (each.path, each.arrays)),
        )

    def add(self, name: str, tokens: Sequence[int] | Tokens, sources: Iterable[str] = ()) -> None:
        """Adds a text under ``name``, which takes the place of what had that name.

        Raises ModelFileError and ModelMismatch as `segments` does.
        """
        added, own = time.time(), np.asarray(tokens, np.uint32)
        pieces = [own[at : at + self._max_segment_tokens] for at in range(0, len(own), self._max_segment_tokens)]
        with self._locked():
            self._keep(lambda text: text.name != name)
            for piece in pieces:
                texts = [(Text(name, len(piece), added, tuple(sources)), piece)]
                absorbed = []
                for stored in sorted(self._fitting(), key=lambda stored: stored.num_tokens):
                    size = sum(len(tokens) for _, tokens in texts)
                    if stored.num_tokens > min(2 * size, self._max_segment_tokens - size):
                        break
                    texts += stored.each()
                    absorbed.append(stored)
                self._write(texts, absorbed, self._fingerprint)

    def remove(self, name: str) -> None:
        """Removes the text of that name, and every text that has it among its sources."""
        if self.path.is_dir():
            with self._locked():
                self._keep(lambda text: not text.is_of(name))

    def trim(self, max_tokens: int) -> None:
        """Where there are more tokens, removes the oldest texts until a quarter of the room is free."""
        texts = sorted(self.texts(), key=lambda text: text.added)
        num_tokens = sum(text.num_tokens for text in texts)
        if num_tokens <= max_tokens:
            return
        oldest = iter(texts)
        going = set[str]()
        while num_tokens > 3 * max_tokens / 4:
            text = next(oldest)
            going.add(text.name)
            num_tokens -= text.num_tokens
        with self._locked():
            self._keep(lambda text: text.name not in going)

    def _keep(self, stays: Callable[[Text], bool]) -> None:
        """Writes the segments anew that have a text which does not stay."""
        for stored in self._stored():
            if not all(map(stays, stored.texts)):
                self._write([each for each in stored.each() if stays(each[0])], [stored], stored.tokenizer)
        described = {stored.arrays for stored in self._stored()}
        for arrays in set(self.path.glob("*.npy")) - described:  # of a writer that died
            arrays.unlink(missing_ok=True)

    def _write(self, texts: list[tuple[Text, Tokens]], replaced: Iterable[_Stored], tokenizer: str | None) -> None:
        """Writes a segment with ``texts``, if there are any, and removes those that it replaces."""
        if texts:
            end = np.array([SEPARATOR], np.uint32)
            tokens = np.concatenate([part for _, own in texts for part in (own, end)])
            path = self.path / f"{uuid.uuid4().hex}.json"
            np.save(path.with_suffix(".npy"), np.stack([tokens, suffix_array(tokens)]))
            described = {"format": _FORMAT, "tokenizer": tokenizer, "texts": [asdict(text) for text, _ in texts]}
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(described), encoding="utf-8")
            os.replace(unfinished, path)
        for stored in replaced:
            stored.path.unlink()
            stored.arrays.unlink()

    def _fitting(self) -> list[_Stored]:
        """The segments that are there now; raises ModelMismatch where one is for another tokenizer."""
        stored = self._stored()
        for other in {each.tokenizer for each in stored} - {self._fingerprint}:
            raise ModelMismatch(
                f"the datastore {self.path} was made for the tokenizer {other}, and the target's is "
                f"{self._fingerprint}: build it anew with `rapid datastore build`"
            )
        return stored

    def _stored(self) -> list[_Stored]:
        """The segments that are there now, in order of their names."""
        known = {path: self._known.get(path) or self._read(path) for path in sorted(self.path.glob("*.json"))}
        self._known = {path: stored for path, stored in known.items() if stored}
        return list(self._known.values())

    def _read(self, path: Path) -> _Stored | None:
        try:
            described = json.loads(path.read_bytes())
            if described["format"] != _FORMAT:
                raise ModelFileError(
                    f"{path} has format {described['format']}, not {_FORMAT}: build the datastore anew"
                )
            texts = [Text(**text | {"sources": tuple(text["sources"])}) for text in described["texts"]]
            return _Stored(path, described["tokenizer"], tuple(texts))
        except FileNotFoundError:  # removed since
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ModelFileError(f"{path} does not describe a datastore's segment: {error!r}") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
