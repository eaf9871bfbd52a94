"""The text of an uploaded file. The content decides what kind of file it is, never the name.

PDF and HTML readers are big, and files come from strangers, so each file is read in a process of its own with limited
memory and time, which opens no file but those of Python, no connection and no other process (`confinement.py`). Run as
a program (by its path, so that nothing else is imported), this module reads a file from stdin and writes a line of
JSON: {"text": …}, or {"error": …, "status": …}, and in "missing" what this system cannot take from the process.
"""

import asyncio
import importlib
import io
import json
import logging
import os
import resource
import runpy
import sys
import sysconfig
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger("ray.serve")

_MEMORY_BYTES = 2 * 2**30
_MAX_PAGES = 5_000
_MAX_CHARACTERS = 16 * 2**20
# Modules and libraries that are only imported when a file needs them: encodings, decoders.
_OF_PYTHON = [*{sysconfig.get_path(of) for of in ("stdlib", "platstdlib", "purelib", "platlib")}]
_OF_PYTHON += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
_SNIFFED = 1024  # bytes; the kind shows at the beginning

PDF, HTML, TEXT = "application/pdf", "text/html", "text/plain"
_SUFFIXES = {".pdf": PDF}  # a file that is named so and is of another kind is damaged


class Unreadable(Exception):
    """A file has no readable text. ``status`` is HTTP's: 415 for a kind that is not read, 400 for a damaged file, 413
    for one that is too long."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.status = message, status


def kind_of(data: bytes, filename: str = "") -> str:
    """The media type of ``data``: PDF, HTML, or text, Markdown included.

    Raises:
        Unreadable: ``data`` is of another kind.
    """
    beginning = data[:_SNIFFED]
    kind = TEXT
    if b"%PDF-" in beginning:
        kind = PDF
    elif beginning.startswith(b"PK\x03\x04"):
        raise Unreadable("this is a ZIP archive (or a .docx, .epub or .xlsx, which are such): " + _READ_HERE, 415)
    elif b"\0" in data:
        raise Unreadable(f"byte {data.index(0)} is NUL, so this is a binary file or UTF-16 text: {_READ_HERE}", 415)
    elif any(tag in beginning.lower() for tag in (b"<!doctype html", b"<html", b"<head", b"<body")):
        kind = HTML
    for suffix, expected in _SUFFIXES.items():
        if filename.lower().endswith(suffix) and kind != expected:
            raise Unreadable(f"the file is named {suffix} and is none; {_READ_HERE}", 415)
    return kind


_READ_HERE = "what is read here is UTF-8 text, Markdown, HTML and PDF"


async def extract(data: bytes, *, filename: str = "", timeout_s: float) -> tuple[str, str]:
    """(text, media type) of a file. The process for PDF and HTML is killed after ``timeout_s``.

    Raises:
        Unreadable: the file is of another kind, damaged, encrypted, too long, or without any text.
    """
    kind = kind_of(data, filename)
    text = await (asyncio.to_thread(_decoded, data) if kind == TEXT else _in_a_process(data, timeout_s))
    if len(text) > _MAX_CHARACTERS:
        raise Unreadable(f"its text is longer than {_MAX_CHARACTERS} characters", 413)
    text = text.replace("\r\n", "\n").strip()
    if not text:
        scanned = "; pages that were scanned are images: have them recognised (OCR) first" if kind == PDF else ""
        raise Unreadable(f"the file has no text{scanned}")
    return text, kind


async def _in_a_process(data: bytes, timeout_s: float) -> str:
    # -P: Python must not import the files beside this one as packages.
    reader = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-B", __file__, str(int(timeout_s) + 1)),
        # The environment holds keys, and a file may be made to get hold of its reader.
        env={name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(timeout_s):
            answer, _ = await reader.communicate(data)
    except TimeoutError:
        raise Unreadable(f"the file takes longer than {timeout_s:g} s to read") from None
    finally:
        with suppress(ProcessLookupError):
            reader.kill()
        await reader.wait()
    try:
        found = json.loads(answer)
    except ValueError:
        raise Unreadable("the file takes too much memory or time to read, or is damaged") from None
    if missing := found.get("missing"):
        _warn_once(" and no ".join(missing))
    if "error" in found:
        raise Unreadable(found["error"], found["status"])
    text: str = found["text"]
    return text


@cache
def _warn_once(missing: str) -> None:
    reach = "what reads a stranger's file may reach other files, or the network"
    logger.warning("this system has no %s: %s", missing, reach)


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start} is 0x{data[error.start]:02x}"
        raise Unreadable(f"the file is not UTF-8 text: {wrong}; convert it, for example with iconv", 415) from error


def _read_pdf(data: bytes) -> str:
    from pypdf import PasswordType, PdfReader
    from pypdf.errors import DependencyError, PyPdfError

    try:
        reader = PdfReader(io.BytesIO(data))
        # Many PDFs are encrypted only to forbid printing: these open without a password.
        if reader.is_encrypted and reader.decrypt("") == PasswordType.NOT_DECRYPTED:
            raise Unreadable("the PDF is encrypted: remove its password first")
        if len(reader.pages) > _MAX_PAGES:
            raise Unreadable(f"the PDF has {len(reader.pages)} pages, and at most {_MAX_PAGES} are read", 413)
        pages, room = [], _MAX_CHARACTERS
        for page in reader.pages:
            pages.append(page.extract_text().strip())
            room -= len(pages[-1])
            if room < 0:
                raise Unreadable(f"its text is longer than {_MAX_CHARACTERS} characters", 413)
    except DependencyError as error:
        raise Unreadable(f"the PDF is encrypted in a way that is not read here: {error}") from error
    except PyPdfError as error:
        raise Unreadable(f"the PDF is damaged: {error}") from error
    return "\n\n".join(page for page in pages if page)


def _read_html(data: bytes) -> str:
    """As Markdown: headings, lists and tables stay, and no scripts, styles or pictures."""
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    page = BeautifulSoup(_decoded(data), "lxml")  # knows which end tags are left out
    title = page.title.get_text().strip() if page.title else ""
    for unseen in page(["head", "script", "style", "template", "noscript", "svg", "img", "iframe", "object"]):
        unseen.decompose()
    markdown: str = MarkdownConverter(heading_style="ATX", strip=["a"]).convert_soup(page)
    return f"{title}\n\n{markdown.strip()}"


def main() -> None:
    os.nice(19)  # engines on the same cores go first
    seconds = int(sys.argv[1])
    data = sys.stdin.buffer.read()
    with suppress(ValueError, OSError):  # some systems refuse it
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it writes to its pipe, and to no file
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    read, libraries = (_read_pdf, ("pypdf",)) if kind_of(data) == PDF else (_read_html, ("bs4", "lxml", "markdownify"))
    for library in libraries:  # before the file is looked at, and while this process may still open them
        importlib.import_module(library)
    missing = runpy.run_path(str(Path(__file__).with_name("confinement.py")))["confine"](_OF_PYTHON)
    answer: dict[str, Any] = {"missing": missing}
    try:
        answer["text"] = read(data).encode("utf-8", "replace").decode("utf-8")
    except Unreadable as error:
        answer |= {"error": error.message, "status": error.status}
    except (Exception, RecursionError) as error:
        why = f"the file is damaged ({type(error).__name__}), or made to be hard to read"
        answer |= {"error": why, "status": 400}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
