"""The requests of `examples.json`, and how they are sent: as documented, but for the names of what is there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

TABLE = Path(__file__).with_name("examples.json")


@dataclass(frozen=True)
class Example:
    """One documented request.

    ``refused`` is the field that this server refuses, or how it says that the path or its method is not there; None:
    the request is answered.
    """

    source: str
    name: str
    path: str
    method: str = "POST"
    body: dict[str, Any] | None = None
    form: dict[str, str] = field(default_factory=dict)
    refused: str | None = None

    def about(self, names: Mapping[str, str]) -> Example:
        """The same with ``names`` (model, file, response) in place of ``{model}`` and the like."""
        path, body = self.path, json.dumps(self.body)
        for name, value in names.items():
            path, body = path.replace(f"{{{name}}}", value), body.replace(f'"{{{name}}}"', json.dumps(value))
        return Example(self.source, self.name, path, self.method, json.loads(body), self.form, self.refused)


@dataclass(frozen=True)
class Reply:
    """``answer`` is the body of an answer or of an error, or the events of a stream: (event, data) each."""

    status: int
    answer: Any

    @property
    def refusal(self) -> dict[str, Any] | None:
        """What a refusal says and names, in one form for all APIs; None where the request was answered or failed."""
        error = self.answer.get("error") if isinstance(self.answer, dict) else None
        if not 400 <= self.status < 500 or not isinstance(error, dict):
            return None
        # Anthropic's errors have no field for the name: it begins the message.
        named = error["param"] if "param" in error else error["message"].partition(":")[0]
        return {"status": self.status, "param": named, "code": error.get("code"), "message": error["message"]}


def read_table() -> tuple[dict[str, str], list[Example]]:
    """(where each source is, its examples and the others')."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return table["sources"], [Example(**row) for row in table["examples"]]


def names_of(client: httpx.Client) -> dict[str, str]:
    """The served model, and a file and a response that are made to be asked about."""
    model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
    sent = {"files": {"file": ("mydata.jsonl", b'{"prompt": "One", "completion": "Two"}\n')}}
    file = client.post("/v1/files", data={"purpose": "user_data"}, **sent).raise_for_status().json()["id"]
    body = {"model": model, "input": "One", "max_output_tokens": 1}
    response = client.post("/v1/responses", json=body).raise_for_status().json()["id"]
    return {"model": model, "file": file, "response": response}


def send(client: httpx.Client, example: Example) -> Reply:
    """What the server says to ``example``."""
    how: dict[str, Any] = {"json": example.body} if example.body is not None else {}
    if example.form:
        fields = {name: value for name, value in example.form.items() if name != "file"}
        how = {"data": fields, "files": {"file": (example.form["file"], b'{"prompt": "One", "completion": "Two"}\n')}}
    answer = client.request(example.method, example.path, **how)
    kind = answer.headers.get("content-type", "")
    if kind.startswith("text/event-stream"):
        return Reply(answer.status_code, events_of(answer.text))
    return Reply(answer.status_code, answer.json() if kind.startswith("application/json") else answer.text)


def events_of(text: str) -> list[tuple[str, Any]]:
    """(event, data) of each server-sent event; comments are none. Data that is no JSON (``[DONE]``) stays a text."""
    events = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in lines:
            data = lines["data"]
            events.append((lines.get("event", "message"), data if data == "[DONE]" else json.loads(data)))
    return events
