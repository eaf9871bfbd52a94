"""Tools: OpenAI's fields, the format in which a model writes calls, and the reader that finds calls in its text."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from deployments.schemas import ignored
from deployments.schemas.body import Body
from deployments.schemas.marks import HERMES, HERMES_END, MISTRAL, MISTRAL_ARGS, special_marks
from rapid.errors import InvalidRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rapid.sampling.grammar import Framed


class Function(Body):
    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False


class Tool(Body):
    ignores = ignored.TOOL

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(Body):
    name: str
    arguments: str


class ToolCall(Body):
    """A call in an earlier message."""

    ignores = ignored.TOOL_CALL

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """The call with its arguments as an object, which templates write as JSON themselves.

        Arguments that are no JSON stay as the model wrote them: it may learn from the tool's answer what was wrong.
        """
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except ValueError:
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class CallFormat(NamedTuple):
    """``before`` {"name": …, ``arguments``: {…}} ``after``.

    Without ``arguments`` it is ``before`` the name, `[ARGS]`, and the arguments. ``opening`` is the mark before a call.
    With ``is_told`` the chat template has no place for tools (`deployments.schemas.told_tools`). ``marks`` are the
    model's special tokens among the marks (`special_marks`).
    """

    before: str
    arguments: str
    after: str
    opening: str = ""
    is_told: bool = False
    marks: Mapping[str, int] = {}

    def framed(self, function: Function, schema: Mapping[str, Any]) -> Framed:
        """A call of ``function`` whose arguments ``schema`` allows."""
        from rapid.sampling.grammar import Framed  # here, since it loads PyTorch

        if not self.arguments:
            return Framed(schema, f"{self.before}{function.name}{MISTRAL_ARGS}", self.after)
        head = f'{self.before}{{"name": "{function.name}", "{self.arguments}": '
        return Framed(schema, head, "}" + self.after)


_HERMES = CallFormat(f"{HERMES}\n", "arguments", f"\n{HERMES_END}", HERMES)
_LLAMA = CallFormat("", "parameters", "")  # Llama 3.1
_MISTRAL_LIST = CallFormat(f"{MISTRAL}[", "arguments", "]", MISTRAL)  # until 2024
_MISTRAL = CallFormat(MISTRAL, "", "", MISTRAL)
_TOLD = _HERMES._replace(is_told=True)


def call_format(tokenizer: PreTrainedTokenizerBase) -> CallFormat:
    """The format in which the model writes calls, as its chat template says.

    Raises:
        InvalidRequest: there is no template, or it has calls in a form that is unknown here.
    """
    template = template_of(tokenizer)
    if not template:
        raise InvalidRequest("tools: this model has no chat template", param="tools")
    if not has_place_for_tools(tokenizer):
        return _TOLD
    marks = dict(special_marks(tokenizer))
    if MISTRAL in template:
        return (_MISTRAL if MISTRAL_ARGS in template else _MISTRAL_LIST)._replace(marks=marks)
    if HERMES in template and "<function=" not in template:
        return _HERMES._replace(marks=marks)
    if '"parameters": ' in template:
        return _LLAMA
    raise InvalidRequest("tools: this model's chat template has calls written in an unknown way", param="tools")


def has_place_for_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template shows tools and the calls of earlier messages."""
    template = template_of(tokenizer)
    return "tools" in template and "tool_calls" in template


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template; empty where the model has none."""
    return str(tokenizer.get_chat_template(tools=[{}])) if tokenizer.chat_template else ""


def call_grammar(tools: list[Tool], choice: ToolChoice, form: CallFormat, *, several: bool) -> str | None:
    """The grammar that holds the output to calls of ``tools``; None where the output is free.

    A ``choice`` of a named tool, or "required", is one call. With "auto" the output may also be text, or hold text, and
    a call of a strict tool follows its schema; ``several`` is whether there may be more than one call.

    Raises:
        InvalidRequest: the named tool does not exist, or its parameters cannot be enforced.
    """
    # Here, since it loads PyTorch: the process that listens only checks bodies.
    from rapid.sampling.grammar import json_grammar, json_in_text, json_or_text

    functions = [tool.function for tool in tools]
    if isinstance(choice, NamedTool):
        functions = [function for function in functions if function.name == choice.function.name]
        if not functions:
            raise InvalidRequest(f"tool_choice: there is no tool {choice.function.name!r}", param="tool_choice")
    calls = []
    for function in functions:
        is_held = choice != "auto" or function.strict or form.is_told
        schema = function.parameters if is_held else {"type": "object"}
        calls.append(form.framed(function, schema))
    if choice != "auto":
        return json_grammar(*calls, param="tools", marks=form.marks)
    if several and not form.is_told and not any(function.strict for function in functions):
        return None
    if form.opening:
        return json_in_text(*calls, opening=form.opening, several=several, param="tools", marks=form.marks)
    return json_or_text(*calls, beginning=_BARE_BEGINNING, several=several, param="tools")


_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_BARE = ('{"name"', '{"type"')  # the beginnings of a call without an opening, white space apart
_BARE_BEGINNING = r'\s*\{\s*"(name|type)"'


class CallReader:
    """Separates calls of ``tools`` from text while it is written. Calls are returned whole, at the end of the text."""

    def __init__(self, tools: list[Tool], form: CallFormat) -> None:
        self._names = [tool.function.name for tool in tools]  # no set: a model may write any JSON for a name
        self._opening = form.opening
        self._bodies = _BODIES[form.opening]
        self._text, self._shown = "", 0

    def push(self, text: str) -> str:
        """Adds ``text``; returns the text that is not part of a call and was not returned before."""
        self._text += text
        end = self._tagged_call() if self._opening else self._bare_call()
        shown, self._shown = self._text[self._shown : end], end
        return shown

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """(the rest of the text, the calls in OpenAI's form). What only looks like a call is text, also among calls."""
        rest = self._text[self._shown :]
        text, calls = "", []
        for piece, body in self._bodies(rest):
            if call := self._read(body):
                calls.append(call)
            else:
                text += piece
        return text.strip() if calls else rest, calls

    def _bare_call(self) -> int:
        """Where calls may begin: at the start of the text, or nowhere, which is the end of the text so far."""
        if self._shown:
            return len(self._text)
        begins = "".join(self._text[:200].split())
        return 0 if any(begins.startswith(head[: len(begins)]) for head in _BARE) else len(self._text)

    def _tagged_call(self) -> int:
        """Where the first opening begins, or may begin at the end of the text so far."""
        opening = self._opening
        end = self._text.find(opening)
        if end < 0:
            held = (n for n in range(len(opening) - 1, 0, -1) if self._text.endswith(opening[:n]))
            end = len(self._text) - next(held, 0)
        return end

    def _read(self, call: Any) -> dict[str, Any] | None:
        arguments = call.get("arguments", call.get("parameters")) if isinstance(call, dict) else None
        if not isinstance(arguments, dict) or call.get("name") not in self._names:
            return None
        function = {"name": call["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
        name = f"call_{uuid.uuid4().hex}"
        return {"id": short_id(name) if self._opening == MISTRAL else name, "type": "function", "function": function}


def short_id(call_id: str) -> str:
    """A call's name as Mistral's chat templates want it, of nine letters and digits."""
    is_short = re.fullmatch("[a-zA-Z0-9]{9}", call_id)
    return call_id if is_short else hashlib.sha256(call_id.encode("utf-8", "replace")).hexdigest()[:9]


def _tagged_bodies(text: str) -> Iterator[tuple[str, Any]]:
    """The pieces of ``text``, each with the JSON of the call that it is, or None."""
    end = 0
    for match in _CALL.finditer(text):
        yield text[end : match.start()], None
        end = match.end()
        try:
            yield match.group(), json.loads(match.group(1))
        except (ValueError, RecursionError):
            yield match.group(), None
    yield text[end:], None


def _bare_bodies(text: str) -> Iterator[tuple[str, Any]]:
    """Likewise for JSON values one after another, with semicolons or white space between them."""
    end = 0
    while begin := re.compile(r"[;\s]*(?=\S)").match(text, end):
        try:
            value, after = json.JSONDecoder().raw_decode(text, begin.end())
        except (ValueError, RecursionError):
            break
        yield text[end:after], value
        end = after
    yield text[end:], None


_MISTRAL_CALL = re.compile(r"\s*([a-zA-Z0-9_-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(?=\{)")


def _mistral_bodies(text: str) -> Iterator[tuple[str, Any]]:
    """Likewise behind `[TOOL_CALLS]`: a list of calls, or a name and the arguments."""
    before, *parts = text.split(MISTRAL)
    yield before, None
    for part in parts:
        head = _MISTRAL_CALL.match(part)
        begin = head.end() if head else len(part) - len(part.lstrip())
        try:
            value, end = json.JSONDecoder().raw_decode(part, begin)
        except (ValueError, RecursionError):
            yield MISTRAL + part, None
            continue
        if head:
            yield MISTRAL + part[:end], {"name": head[1], "arguments": value}
        else:
            for one in value if isinstance(value, list) else [value]:
                yield json.dumps(one, ensure_ascii=False), one
        yield part[end:], None


_BODIES: dict[str, Callable[[str], Iterator[tuple[str, Any]]]] = {
    "": _bare_bodies,
    HERMES: _tagged_bodies,
    MISTRAL: _mistral_bodies,
}
