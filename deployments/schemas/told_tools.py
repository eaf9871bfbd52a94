"""Tools for a model whose chat template has no place for them: the messages tell it of them, in Hermes' form.

The grammar holds the output to that form (`deployments.schemas.tools.call_grammar`), so that even a model that never
learned it writes calls that can be read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from rapid.text.prompts import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INTRODUCTION = """You can call functions. These are there, one a line, with the JSON schema of their arguments:
{functions}
To call one, write its name and its arguments like this:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument": "its value"}}}}
</tool_call>
What the function returns comes back between <tool_response> and </tool_response>."""


def with_tools_told(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> list[Message]:
    """``messages`` in which ``tools`` (in OpenAI's form), and earlier calls and their results, are text."""
    told = _as_text(messages)
    if not tools:
        return told
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    introduction = _INTRODUCTION.format(functions=functions)
    role = "system" if _takes_system(tokenizer) else "user"
    at = next((i for i, message in enumerate(told) if message.role == role), None)
    if at is None or (role == "system" and at > 0):
        return [Message(role, introduction), *told]
    first = told[at]
    shift = len(introduction) + 2
    documents = tuple((start + shift, end + shift) for start, end in first.documents)
    told[at] = first._replace(content=f"{introduction}\n\n{first.content}", documents=documents)
    return told


def _as_text(messages: Sequence[Message]) -> list[Message]:
    told: list[Message] = []
    after_result = False
    for message in messages:
        calls = message.more.get("tool_calls", [])
        is_result = message.role == "tool"
        more = {k: v for k, v in message.more.items() if k not in ("tool_calls", "tool_call_id")}
        if is_result:
            result = f"<tool_response>\n{message.content}\n</tool_response>"
            if after_result:  # many templates want user and assistant to take turns
                told[-1] = told[-1]._replace(content=f"{told[-1].content}\n{result}")
            else:
                told.append(Message("user", result))
        elif calls:
            written = [f"<tool_call>\n{_written(call['function'])}\n</tool_call>" for call in calls]
            told.append(Message(message.role, "\n".join([message.content] * bool(message.content) + written), more))
        else:
            told.append(message)
        after_result = is_result
    return told


def _written(function: dict[str, Any]) -> str:
    arguments = function["arguments"]
    if isinstance(arguments, str):  # no JSON, and shown as it was
        return f'{{"name": {json.dumps(function["name"])}, "arguments": {arguments}}}'
    return json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)


def _takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        tokenizer.apply_chat_template(
            [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], tokenize=False
        )
    except (TemplateError, ValueError):
        return False
    return True
