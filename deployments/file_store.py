"""Uploaded files in a folder that several processes may share, and what is known of each content, once per content.

    owners/<owner>/<file id>.json    one upload: its name, purpose, and which content it has
    contents/<SHA-256>/original      the bytes as they came; `text` is what was read from them, `state.json` a `Content`
    lock                             held while something comes or goes

Everything is written beside its place and renamed, so that nobody ever reads half of it.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rapid.errors import RapidError

_FILE_ID = re.compile(r"file-[0-9a-f]{32}")


class FileNotStored(RapidError):
    """There is no such file, or it is another key's."""

    _code = "file_not_found"
    _status = 404


@dataclass(frozen=True)
class Upload:
    """One owner's file; ``content`` is the SHA-256 of its bytes."""

    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    content: str


@dataclass(frozen=True)
class Content:
    """What is known of a content: its text, and how far its vectors are.

    ``made_with`` tells what the chunks depend on; they lie in the vector store under ``vectors``. ``error`` says why
    there are none.
    """

    media_type: str
    text_sha256: str
    tokens: int
    made_with: str = ""
    vectors: str = ""
    chunks: int = 0
    embedded: int = 0
    error: str | None = None

    def is_embedded(self, made_with: str) -> bool:
        return self.made_with == made_with and self.embedded == self.chunks


class FileStore:
    """The files under ``folder``, which is made when the first one comes.

    What is asked for and not there raises FileNotStored.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, owner: str, filename: str, purpose: str, data: bytes, text: str, content: Content) -> Upload:
        """A new upload. What is known of the same bytes already stays as it is."""
        name = hashlib.sha256(data).hexdigest()
        upload = Upload(f"file-{uuid.uuid4().hex}", filename, purpose, len(data), int(time.time()), name)
        with self._locked():
            place = self._content(name)
            if not place.is_dir():
                made = place.with_name(f".{uuid.uuid4().hex}")
                made.mkdir(parents=True)
                (made / "original").write_bytes(data)
                (made / "text").write_text(text, encoding="utf-8", newline="")
                _write(made / "state.json", asdict(content))
                made.rename(place)
            _write(self._folder / "owners" / owner / f"{upload.id}.json", asdict(upload))
        return upload

    def uploads(self, owner: str) -> list[Upload]:
        """The owner's files, the oldest first."""
        found = [self._read(path) for path in (self._folder / "owners" / owner).glob("file-*.json")]
        return sorted((upload for upload in found if upload), key=lambda upload: (upload.created_at, upload.id))

    def upload(self, owner: str, file_id: str) -> Upload:
        found = None
        if _FILE_ID.fullmatch(file_id):  # or else it could lead anywhere
            found = self._read(self._folder / "owners" / owner / f"{file_id}.json")
        if found is None:
            raise FileNotStored(f"there is no file {file_id!r}", param="file_id")
        return found

    def delete(self, owner: str, file_id: str) -> tuple[str, Content] | None:
        """Removes the file; returns its text and what was known of it where no other file has that text."""
        with self._locked():
            upload = self.upload(owner, file_id)
            (self._folder / "owners" / owner / f"{file_id}.json").unlink()
            uploads = [self._read(path) for path in self._folder.glob("owners/*/file-*.json")]
            if any(other and other.content == upload.content for other in uploads):
                return None
            text, content = self.text(upload.content), self.content(upload.content)
            shutil.rmtree(self._content(upload.content))
            others = [self.content(place.name) for place in self._folder.glob("contents/[0-9a-f]*")]
            if any(other.text_sha256 == content.text_sha256 for other in others):
                return None
            return text, content

    def has(self, content: str) -> bool:
        return self._content(content).is_dir()

    def content(self, name: str) -> Content:
        return Content(**json.loads(self._bytes(name, "state.json")))

    def update(self, name: str, content: Content) -> None:
        """Raises FileNotStored when it was deleted meanwhile."""
        try:
            _write(self._content(name) / "state.json", asdict(content), make_folder=False)
        except FileNotFoundError:
            raise FileNotStored("the file was deleted") from None

    def text(self, name: str) -> str:
        return self._bytes(name, "text").decode("utf-8")

    def original(self, name: str) -> bytes:
        return self._bytes(name, "original")

    @contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """Whether this process is the one that works on a content now; the system frees what a dead one held."""
        try:
            with (self._content(name) / "claim").open("w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield False
                else:
                    yield True
        except FileNotFoundError:
            raise FileNotStored("the file was deleted") from None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _content(self, name: str) -> Path:
        return self._folder / "contents" / name

    def _bytes(self, name: str, what: str) -> bytes:
        try:
            return (self._content(name) / what).read_bytes()
        except FileNotFoundError:
            raise FileNotStored("the file was deleted") from None

    @staticmethod
    def _read(path: Path) -> Upload | None:
        """None where it was deleted meanwhile."""
        try:
            return Upload(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None


def _write(path: Path, record: dict[str, object], *, make_folder: bool = True) -> None:
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{uuid.uuid4().hex}")
    unfinished.write_text(json.dumps(record), encoding="utf-8")
    os.replace(unfinished, path)
