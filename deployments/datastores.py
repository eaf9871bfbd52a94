"""What requests draft from: a datastore that was built for all keys, and each key's own files and answers."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deployments.config import AppConfig, ConfigError
from rapid.datastore.folder import DatastoreFolder
from rapid.datastore.search import Datastore
from rapid.errors import RapidError
from rapid.text.encoding import encode_in_pieces
from rapid.text.tokenizer import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["files", "answers"]
logger = logging.getLogger(__name__)


class Datastores:
    """The datastores of ``config``. Only requests with the same salt draft from what a request brought.

    All methods read or write files, and so belong into a thread.

    Raises:
        ConfigError: there is no datastore where the configuration says.
        ModelMismatch: it was built for another tokenizer.
    """

    def __init__(self, config: AppConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._tokenizer = config.datastore, tokenizer
        self._root = config.files.path / "datastores"
        self._fingerprint = fingerprint(tokenizer) if config.datastore.is_used else ""
        self._folders: dict[Path, DatastoreFolder] = {}
        path = config.datastore.path
        self._shared = [self._folder(Path(path).expanduser())] if path else []
        if path and not self._shared[0].segments():
            raise ConfigError(f"datastore.path: {path} holds no datastore: make one with `rapid datastore build`")

    def of(self, salt: str) -> Datastore | None:
        """What a request with ``salt`` drafts from; None where no datastore is configured."""
        if not self._config.is_used:
            return None
        segments = []
        for folder in [*self._shared, *(self._own(salt, kind) for kind in self._kinds)]:
            try:
                segments += folder.segments()
            except RapidError as error:  # drafts are no reason to refuse an answer
                logger.warning("drafting without a datastore: %s", error.message)
        return Datastore(segments)

    def has_file(self, salt: str, text_sha256: str) -> bool:
        """Whether nothing is left to add of this text."""
        return not self._config.files or any(text.name == text_sha256 for text in self._own(salt, "files").texts())

    def add_file(self, salt: str, text_sha256: str, text: str) -> None:
        """Adds the text of a file, unless it is there."""
        if not self.has_file(salt, text_sha256):
            self._own(salt, "files").add(text_sha256, encode_in_pieces(self._tokenizer, text))

    def add_answer(self, salt: str, tokens: list[int], sources: Iterable[str]) -> None:
        """Adds an answer to a question about the texts ``sources``, if answers are kept; the oldest make room."""
        if self._config.answer_tokens and tokens:
            folder = self._own(salt, "answers")
            folder.add(uuid.uuid4().hex, tokens, sources)
            folder.trim(self._config.answer_tokens)

    def remove(self, salt: str, text_sha256: str) -> None:
        """Removes a text, and the answers about it, whatever the configuration says now."""
        for path in self._root.glob(f"*/{_named(salt)}/*"):
            DatastoreFolder(path).remove(text_sha256)

    @property
    def _kinds(self) -> list[Kind]:
        wanted: dict[Kind, bool] = {"files": self._config.files, "answers": self._config.answer_tokens > 0}
        return [kind for kind, is_wanted in wanted.items() if is_wanted]

    def _own(self, salt: str, kind: Kind) -> DatastoreFolder:
        return self._folder(self._root / self._fingerprint / _named(salt) / kind)

    def _folder(self, path: Path) -> DatastoreFolder:
        return self._folders.setdefault(path, DatastoreFolder(path, self._fingerprint))


def _named(salt: str) -> str:
    return salt or "shared"
