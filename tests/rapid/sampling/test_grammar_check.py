"""A schema that is made to break its compiler is refused with words, and breaks nothing here."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import llguidance
import pytest

from rapid.errors import InvalidRequest
from rapid.sampling import grammar_check
from rapid.sampling.grammar import Framed, json_grammar

LIBRARY = Path(llguidance.__file__).parents[1]


def chain(number: int) -> dict[str, Any]:
    """Definitions of which each has the next inside, as `$ref`."""

    def one(i: int) -> dict[str, Any]:
        inner = {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}}
        return inner | {"required": ["a"], "additionalProperties": False}

    definitions = {f"d{i}": one(i) for i in range(number)} | {f"d{number}": {"type": "string"}}
    return {"$defs": definitions, "$ref": "#/$defs/d0"}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        (chain(925), "at most 100000 are read"),
        (chain(300), r"301 \$refs"),
        (nested(40), "nested deeper than 64"),
        ({"enum": ["x" * 100_000]}, "bytes"),
    ],
)
def test_a_hostile_schema_is_refused_with_words(schema: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as caught:
        json_grammar(Framed(schema))
    assert caught.value.status == 400 and len(caught.value.message) < 500


def test_a_compiler_that_dies_takes_only_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The overflow that killed the Coordinator, with the limits on schemas out of the way."""
    monkeypatch.setattr("rapid.sampling.grammar.fault_of_schema", lambda *_: "")
    with pytest.raises(InvalidRequest, match="too much memory, time or depth"):
        json_grammar(Framed(chain(5000)))


def test_a_compiler_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "llguidance.py").write_text("while True: pass")
    monkeypatch.setattr(grammar_check, "_SECONDS", 0.2)
    assert "too long" in grammar_check.fault_of_grammar("a grammar of this test", tmp_path)


@pytest.mark.parametrize("schema", [chain(60), nested(25), {"type": "object"}])
def test_large_schemas_that_people_write_are_enforced(schema: dict[str, Any]) -> None:
    assert json_grammar(Framed(schema))


def test_a_schema_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    json_grammar(Framed({"const": "once"}))
    monkeypatch.setattr(subprocess, "run", None)
    assert json_grammar(Framed({"const": "once"}))


def test_the_process_has_little_memory_time_and_stack(tmp_path: Path) -> None:
    told = """
import resource, threading
class LLMatcher:
    def validate_grammar(grammar):
        limits = [resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU)]
        return f"{limits} {threading.stack_size()}"
"""
    (tmp_path / "llguidance.py").write_text(told)
    assert grammar_check.fault_of_grammar("a third", tmp_path) == f"[{2**30}, 5] {2**20}"


def test_the_process_sees_no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it reads came from a stranger; the keys in this process's environment are none of its business."""
    told = "import os\nclass LLMatcher:\n    validate_grammar = lambda grammar: ' '.join(sorted(os.environ))"
    (tmp_path / "llguidance.py").write_text(told)
    monkeypatch.setenv("RAPID_API_KEYS", "secret")
    assert set(grammar_check.fault_of_grammar("another", tmp_path).split()) <= {"PYTHONPATH", "LC_CTYPE"}
