"""Forms with a file, whose name clients write in three ways (RFC 7578, RFC 6266, RFC 2047)."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from urllib.parse import unquote

from fastapi import Request
from starlette.datastructures import FormData, Headers
from starlette.formparsers import MultiPartException, MultiPartParser

from rapid.errors import InvalidRequest

# A parameter that starts behind a semicolon; a quoted value may hold semicolons and quoted quotes.
_NAME = re.compile(rb';\s*filename\s*=\s*("(?:[^"\\]|\\.)*"|[^;]*)', re.IGNORECASE)
_CODED_NAME = re.compile(rb";\s*filename\*\s*=\s*([^;']*)'[^;']*'([^;]*)", re.IGNORECASE)


def is_form(headers: Headers) -> bool:
    """Whether the body is a form with files."""
    return headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data"


@asynccontextmanager
async def form(request: Request, *, max_fields: int) -> AsyncIterator[FormData]:
    """The form in the body, with one file at most. Its file is closed at the end.

    Raises:
        InvalidRequest: the body is no such form.
    """
    try:
        fields = await _Parser(request.headers, request.stream(), max_files=1, max_fields=max_fields).parse()
    except MultiPartException as error:
        raise InvalidRequest(error.message) from error
    try:
        yield fields
    finally:
        await fields.close()


class _Parser(MultiPartParser):
    """Starlette's parser, which knows a file only by a plain ``filename``."""

    def on_headers_finished(self) -> None:
        part = self._current_part
        if part.content_disposition is not None:
            part.content_disposition = with_plain_name(part.content_disposition)
        super().on_headers_finished()


def with_plain_name(disposition: bytes) -> bytes:
    """A Content-Disposition whose file name stands in ``filename``, in UTF-8."""
    coded, plain = _CODED_NAME.search(disposition), _NAME.search(disposition)
    if coded:
        try:
            name = unquote(coded[2].decode("ascii", "replace").strip(), encoding=coded[1].decode("ascii") or "utf-8")
        except LookupError:  # no such character set
            return disposition
    elif plain and b"=?" in plain[1]:
        try:
            name = str(make_header(decode_header(plain[1].decode("utf-8", "replace").strip('"'))))
        except (HeaderParseError, LookupError, ValueError):
            return disposition
    else:
        return disposition
    quoted = name.replace("\\", "\\\\").replace('"', '\\"').replace("\r", "").replace("\n", "")
    others = _NAME.sub(b"", _CODED_NAME.sub(b"", disposition))
    return others + f'; filename="{quoted}"'.encode()
