"""However wrong a body is, it makes few errors, and what is not read does not cost anything."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from deployments.http.errors import parse
from deployments.schemas.chat import ChatRequest
from deployments.schemas.text import TextRequest
from deployments.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from rapid.errors import InvalidRequest

MANY = 20_000
TEXT: dict[str, Any] = {"model": "m", "prompt": "x"}
MESSAGE = {"role": "user", "content": "x"}
CHAT: dict[str, Any] = {"model": "m", "messages": [MESSAGE]}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def _in_message(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "assistant", "content": "x", **fields}]}


BODIES: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "prompt of nulls": (TextRequest, {"model": "m", "prompt": [None] * MANY}),
    "prompt of lists of nulls": (TextRequest, {"model": "m", "prompt": [[None] * 100] * (MANY // 100)}),
    "prompt of mixed kinds": (TextRequest, {"model": "m", "prompt": ["a", 1, None] * MANY}),
    "stop": (TextRequest, TEXT | {"stop": [1] * MANY}),
    "stop_token_ids": (TextRequest, TEXT | {"stop_token_ids": ["a"] * MANY}),
    "too many stop_token_ids": (TextRequest, TEXT | {"stop_token_ids": [1] * MANY}),
    "logit_bias": (TextRequest, TEXT | {"logit_bias": {f"k{i}": "x" for i in range(MANY)}}),
    "unknown fields": (TextRequest, TEXT | {f"k{i}": 1 for i in range(MANY)}),
    "unknown fields inside": (TextRequest, TEXT | {"rapid": {f"k{i}": 1 for i in range(MANY)}}),
    "messages": (ChatRequest, {"model": "m", "messages": [None] * MANY}),
    "empty messages": (ChatRequest, {"model": "m", "messages": [{}] * MANY}),
    "too many messages": (ChatRequest, {"model": "m", "messages": [MESSAGE] * MANY}),
    "parts": (ChatRequest, _in_message(content=[{"type": "text"}] * MANY)),
    "no parts": (ChatRequest, _in_message(content=[1] * MANY)),
    "calls": (ChatRequest, _in_message(tool_calls=[{}] * MANY)),
    "too many calls": (ChatRequest, _in_message(tool_calls=[CALL] * MANY)),
    "tools": (ChatRequest, CHAT | {"tools": [{"type": "function"}] * MANY}),
    "messages to tokenize": (TokenizeRequest, {"messages": [{}] * MANY}),
    "tokens": (DetokenizeRequest, {"tokens": [None] * MANY}),
}


@pytest.mark.parametrize("body", BODIES)
def test_a_body_that_is_all_wrong_makes_few_errors(body: str) -> None:
    """As many as there are fields, at most: each error is an object, and a body has room for a million items."""
    kind, sent = BODIES[body]
    raw = json.dumps(sent).encode()
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(raw)
    assert caught.value.error_count() <= 8
    with pytest.raises(InvalidRequest) as shown:
        parse(kind, raw)
    assert shown.value.param and len(shown.value.message) < 1000


def test_a_name_of_any_length_is_not_sent_back() -> None:
    for sent in ({"k" * 100_000: 1}, TEXT | {"model": "m" * 100_000}):
        with pytest.raises(InvalidRequest) as shown:
            parse(TextRequest, json.dumps(sent).encode())
        assert len(shown.value.message) < 1000
