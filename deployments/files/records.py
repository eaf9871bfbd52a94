"""What is known of an upload, and of a content."""

import hashlib
from dataclasses import dataclass

from rapid.errors import InvalidRequest, RapidError

BATCH, BATCH_OUTPUT = "batch", "batch_output"  # requests and their answers, which no chat reads
PURPOSES = ("user_data", "assistants", BATCH)  # of what clients upload
LEAST_EXPIRY_S, MOST_EXPIRY_S = 3_600, 2_592_000  # until a file expires, as OpenAI has it


class FileNotStored(RapidError):
    """The file is absent, or belongs to another tenant."""

    _code = "file_not_found"
    _status = 404


@dataclass(frozen=True)
class Upload:
    """One tenant's file; ``content`` is the name of its bytes. A file that ``is_going`` can only be deleted.

    ``bytes`` came, and ``stored`` count against the tenant's room: these, and the text that was read from them. Nobody
    reads the file from ``expires_at`` on, in seconds since 1970.
    """

    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    content: str
    is_going: bool = False
    stored: int = 0
    expires_at: int | None = None

    def check_is_read(self, param: str) -> None:
        """
        Raises:
            InvalidRequest: it holds requests or answers of a batch, and no text for a chat.
        """
        if self.purpose in (BATCH, BATCH_OUTPUT):
            raise InvalidRequest(f"no chat reads a file whose purpose is {self.purpose}", param=param)


@dataclass(frozen=True)
class Content:
    """One content: its text, and how many of its ``chunks`` are ``embedded``.

    ``made_with`` names what the chunks depend on; ``vectors`` is their namespace in the vector store. A content
    ``is_going`` when every file that has it is. Contents with another ``salt`` are other contents. One that is not
    ``is_read`` has no text and no vectors.
    """

    media_type: str
    text_sha256: str
    tokens: int
    made_with: str = ""
    vectors: str = ""
    chunks: int = 0
    embedded: int = 0
    is_going: bool = False
    salt: str = ""
    is_read: bool = True

    def is_embedded(self, made_with: str) -> bool:
        return not self.is_read or (self.made_with == made_with and self.embedded == self.chunks)


def name_of(data: bytes, salt: str) -> str:
    """The name of a content: the same bytes have the same name where they have the same salt."""
    return hashlib.sha256(salt.encode() + data).hexdigest()
