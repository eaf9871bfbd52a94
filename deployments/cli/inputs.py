"""From files and stdin to the text of a prompt."""

import sys
from pathlib import Path

from rapid.errors import InvalidRequest

STDIN = Path("-")


def read_content(documents: list[Path], question: str | None) -> str:
    """The user's message: documents and question with a blank line between each two.

    Without documents, what is piped in is the document. Without a question too, it is the whole message.

    Raises:
        InvalidRequest: there is nothing to ask or to ask about, or a document is no UTF-8 text.
    """
    if question is not None and not question.strip():
        raise InvalidRequest("--question is empty")
    texts = [read_document(path) for path in documents]
    if not documents and not sys.stdin.isatty() and (piped := sys.stdin.buffer.read()):
        texts = [_decode(piped, "stdin")]
    if question is None and (documents or not texts):
        raise InvalidRequest("--question is needed; see rapid generate --help")
    return "\n\n".join([*texts, question] if question else texts)


def read_document(path: Path) -> str:
    """Raises InvalidRequest when it cannot be read, or is no UTF-8 text."""
    if path == STDIN:
        return _decode(sys.stdin.buffer.read(), "stdin")
    try:
        return _decode(path.read_bytes(), str(path))
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error


def _decode(data: bytes, name: str) -> str:
    if b"\0" in data:
        raise InvalidRequest(f"{name} is not plain text: byte {data.index(0)} is NUL (a binary file, or UTF-16)")
    try:
        text = data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start} is 0x{data[error.start]:02x}"
        raise InvalidRequest(f"{name} is not UTF-8 text: {wrong}; convert it, for example with iconv") from error
    if not text.strip():
        raise InvalidRequest(f"{name} is empty")
    return text.rstrip("\n")
