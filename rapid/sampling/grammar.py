"""Output that follows a grammar: llguidance computes which tokens may come next.

llguidance is imported only when a request asks for a grammar. A grammar is tried in a process of its own, once
(`grammar_check`). The engine then compiles it within milliseconds, while the output follows it. llguidance needs most
of a second to read a model's vocabulary, so vocabularies are cached.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from rapid.errors import InvalidRequest
from rapid.sampling.grammar_check import MAX_BYTES, fault_of_grammar, fault_of_schema

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from transformers import PreTrainedTokenizerBase

# The white space in JSON is fixed to that of Python's json: a small model would otherwise write blank lines for ever.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# What llguidance enforces. Any other `format` only describes, as JSON Schema has it by default.
_FORMATS = frozenset(["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"])
_UUIDS = re.compile("uuid[1-8]")  # pydantic's
_DATA = frozenset(("const", "default", "enum", "example", "examples"))  # keywords that hold no schemas

Marks = Mapping[str, int]  # texts that are special tokens, which no other token spells
NO_MARKS: Marks = MappingProxyType({})

_vocabularies: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[int, ...], LLTokenizer]] = WeakKeyDictionary()
_building = threading.Lock()


class Framed(NamedTuple):
    """JSON that ``schema`` allows, between two fixed texts."""

    schema: Mapping[str, Any]
    before: str = ""
    after: str = ""


def json_grammar(*alternatives: Framed, param: str = "response_format", marks: Marks = NO_MARKS) -> str:
    """A grammar of any one of ``alternatives``. Texts around their JSON that are in ``marks`` are these tokens.

    Raises:
        InvalidRequest: a schema is invalid, or has a keyword that cannot be enforced; ``param`` names its field.
    """
    return _compiled(f"start: {_any_of(alternatives, param, marks)}", param)


def json_in_text(*alternatives: Framed, opening: str, several: bool, param: str, marks: Marks = NO_MARKS) -> str:
    """A grammar of any text in which each ``opening`` begins one of ``alternatives``; ``marks`` as in `json_grammar`.

    Args:
        opening: the beginning of the text before each alternative's JSON.
        several: whether ``opening`` may come more than once.

    Raises:
        InvalidRequest: as `json_grammar`.
    """
    any_text = "(?s:.*)"
    rests = [one._replace(before=one.before.removeprefix(opening)) for one in alternatives]
    if opening in marks:  # which no text spells
        opened, text = f"opened: ANY {_terms(opening, marks)}\nANY: /{any_text}/", f"/{any_text}/"
    else:
        opened = f"opened[lazy]: /{any_text}/ {json.dumps(opening)}"
        text = f"/{any_text}/ & ~/{any_text}{re.escape(opening)}{any_text}/"
    rules = f"""start: (opened json){"*" if several else "?"} TEXT
        json: {_any_of(rests, param, marks)}
        {opened}
        TEXT: {text}"""
    return _compiled(rules, param)


def json_or_text(*alternatives: Framed, beginning: str, several: bool, param: str) -> str:
    """A grammar of ``alternatives``, or of a text that does not begin like them.

    Args:
        beginning: the regular expression of their beginning.
        several: whether a semicolon and another alternative may follow.

    Raises:
        InvalidRequest: as `json_grammar`.
    """
    rules = f"""start: TEXT | json{' ("; " json)*' if several else ""}
        json: {_any_of(alternatives, param)}
        TEXT: /(?s:.*)/ & ~/{beginning}(?s:.*)/"""
    return _compiled(rules, param)


def lark_grammar(rules: str, param: str) -> str:
    """A grammar of ``rules`` in llguidance's dialect of Lark, whose first rule is `start`.

    Raises:
        InvalidRequest: the rules are wrong or too large; ``param`` names their field.
    """
    if len(rules) > MAX_BYTES:
        raise InvalidRequest(f"{param}: a grammar may have {MAX_BYTES} characters", param=param)
    return _compiled(rules, param)


def regex_grammar(regex: str, param: str) -> str:
    """A grammar of the texts that ``regex`` matches whole.

    Raises:
        InvalidRequest: as `lark_grammar`.
    """
    escaped = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\/", regex).replace("\n", r"\n")
    return lark_grammar(f"start: /{escaped}/", param)


def after_reasoning(grammar: str, opening: str, closing: str, *, is_open: bool, marks: Marks = NO_MARKS) -> str:
    """``grammar`` behind any text between ``opening`` and ``closing``, which need not be there unless ``is_open``.

    ``marks`` are those of `json_grammar`.
    """
    begins, thought, text = _terms(opening, marks), "thought SPACE", "/(?s:.*)/"
    is_token = closing in marks
    rules = f"""start: {thought if is_open else f"({begins} {thought})?"} @answer
        {"thought: ANY" if is_token else f"thought[lazy]: {text}"} {_terms(closing, marks)}
        {f"ANY: {text}" if is_token else ""}
        SPACE: /\\s{{0,2}}/"""
    return json.dumps({"grammars": [{"lark_grammar": rules}, {"name": "answer", "lark_grammar": grammar}]})


def _any_of(alternatives: Sequence[Framed], param: str, marks: Marks = NO_MARKS) -> str:
    rules = []
    for schema, before, after in alternatives:
        text = json.dumps(schema)
        if fault := fault_of_schema(schema, len(text)):
            raise InvalidRequest(f"{param}: this JSON schema is too large: {fault}", param=param)
        body = f"%json {json.dumps({**_with_known_formats(schema), 'x-guidance': _JSON_OPTIONS})}"
        rules.append(f"{_terms(before, marks)} {body} {_terms(after, marks)}".strip())
    return " | ".join(rules)


def _terms(text: str, marks: Marks) -> str:
    """``text`` as terms of a rule; it may be empty."""
    pieces = re.split(f"({'|'.join(map(re.escape, marks))})", text) if marks else [text]
    return " ".join(f"<[{marks[piece]}]>" if piece in marks else json.dumps(piece) for piece in pieces if piece)


def _with_known_formats(schema: Any) -> Any:
    """``schema`` without a `format` that is not enforced. A property may have this name: its value is no text."""
    if isinstance(schema, list):
        return [_with_known_formats(inner) for inner in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept = {key: value if key in _DATA else _with_known_formats(value) for key, value in schema.items()}
    form = kept.get("format")
    if isinstance(form, str) and form not in _FORMATS:
        del kept["format"]
        if _UUIDS.fullmatch(form):
            kept["format"] = "uuid"
    return kept


def _compiled(rules: str, param: str) -> str:
    library = _library()
    grammar: str = library.LLMatcher.grammar_from_lark(rules)
    if wrong := fault_of_grammar(grammar, Path(library.__file__).parents[1]):
        reason = wrong.partition("\n")[0].partition("failed to compile JSON schema: ")
        raise InvalidRequest(f"{param}: this cannot be enforced: {reason[2] or reason[0]}", param=param)
    return grammar


class Grammar:
    """The state of one sequence in a grammar.

    Every call passes the whole output. The state keeps the output of the last call, and rolls back to the point where
    the two outputs agree, so a rejected draft needs no message.

    Raises:
        InvalidRequest: the grammar, or the model's vocabulary, cannot be used.
    """

    def __init__(self, grammar: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos: Sequence[int]) -> None:
        self._vocab_size, self._eos = vocab_size, frozenset(eos)
        self._matcher = _library().LLMatcher(_vocabulary(tokenizer, vocab_size, eos), grammar, log_level=0)
        self._read: list[int] = []
        self._check()

    def num_allowed(self, output: list[int], tokens: list[int]) -> int:
        """How many of ``tokens`` may follow ``output`` before the first that breaks the grammar."""
        self._go_to(output)
        return int(self._matcher.validate_tokens(tokens))

    def allowed(self, output: list[int]) -> NDArray[np.bool_]:
        """[V], True where a token may follow ``output``; at the grammar's end only an end of sequence may.

        Raises:
            InvalidRequest: no token of the model may follow.
        """
        self._go_to(output)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        if not bits.any():
            raise InvalidRequest("no token of this model can go on as the grammar asks", param="response_format")
        return np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)

    def _go_to(self, output: list[int]) -> None:
        # An end of sequence is not a token of the grammar, and llguidance could not roll it back.
        ended = next((i for i, token in enumerate(output) if token in self._eos), len(output))
        agree = ended
        if self._read[:ended] != output[: len(self._read)]:
            agree = next(i for i, (ours, theirs) in enumerate(zip(self._read, output, strict=False)) if ours != theirs)
        if agree < len(self._read):
            self._matcher.rollback(len(self._read) - agree)
            del self._read[agree:]
        new = output[len(self._read) : ended]
        self._matcher.consume_tokens(new)
        self._read += new
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            raise InvalidRequest(f"response_format: the grammar cannot be followed: {reason}", param="response_format")


def _vocabulary(tokenizer: Any, vocab_size: int, eos: Sequence[int]) -> LLTokenizer:
    from llguidance.hf import from_tokenizer

    with _building:
        known = _vocabularies.setdefault(tokenizer, {})
        key = (vocab_size, *eos)
        if key not in known:
            known[key] = from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(eos))
        return known[key]


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise InvalidRequest(
            "structured output needs llguidance, which is not installed here: pip install llguidance",
            param="response_format",
        ) from error
    return llguidance
