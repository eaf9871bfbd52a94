"""The body of `POST /v1/batches`, and the lines of the file that it names: OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from deployments.schemas.body import MAX_NAME, AtMost, Body
from deployments.schemas.uploads import ExpiresAfter

MAX_REQUESTS = 50_000  # OpenAI's
_MAX_ERRORS = 20  # that are told of one file

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]


class BatchRequest(Body):
    """`POST /v1/batches`."""

    input_file_id: str = Field(max_length=MAX_NAME)
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Annotated[dict[str, str], AtMost(16)] = Field(default_factory=dict)
    output_expires_after: ExpiresAfter | None = None


class Line(Body):
    """One line of the input: a request, which ``custom_id`` names."""

    custom_id: str = Field(min_length=1, max_length=MAX_NAME)
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


class Wrong(NamedTuple):
    """What is wrong with line ``line`` (from 1; None: with the whole file), as OpenAI says it."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


def read_lines(data: bytes, endpoint: str) -> tuple[list[Line], list[Wrong]]:
    """The requests of an input file for ``endpoint``, and what is wrong with it; a file with faults is not begun."""
    lines: list[Line] = []
    wrong: list[Wrong] = []
    seen: set[str] = set()
    for number, text in _lines(data):
        if len(wrong) == _MAX_ERRORS or len(lines) > MAX_REQUESTS:
            break
        try:
            line = Line.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            code = "invalid_json_line" if first["type"] == "json_invalid" else "invalid_line"
            param = ".".join(map(str, first["loc"])) or first.get("ctx", {}).get("field") or None
            wrong.append(Wrong(code, f"{param or 'the line'}: {first['msg']}", param, number))
            continue
        if line.url != endpoint:
            wrong.append(Wrong("mismatched_url", f"the batch is for {endpoint}", "url", number))
        if line.custom_id in seen:
            wrong.append(Wrong("duplicate_custom_id", "another line has the same custom_id", "custom_id", number))
        if line.body.get("stream"):
            wrong.append(Wrong("invalid_line", "answers of a batch are not streamed", "body.stream", number))
        seen.add(line.custom_id)
        lines.append(line)
    if len(lines) > MAX_REQUESTS:
        wrong.append(Wrong("too_many_requests", f"a batch has at most {MAX_REQUESTS} requests"))
    if not lines and not wrong:
        wrong.append(Wrong("empty_file", "the file has no requests"))
    return lines, wrong


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    return ((i, line) for i, line in enumerate(data.split(b"\n"), 1) if line.strip())


def answer_line(request_id: str, custom_id: str, status: int, body: bytes) -> str:
    """One line of the output: what came for the request ``custom_id``."""
    response = {"status_code": status, "request_id": request_id, "body": json.loads(body)}
    return json.dumps(
        {"id": f"batch_req_{request_id}", "custom_id": custom_id, "response": response, "error": None},
        ensure_ascii=False,
    )
