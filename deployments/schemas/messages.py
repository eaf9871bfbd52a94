"""The messages of a chat as a client sends them, and the prompt that they make."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from inspect import signature
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from deployments.schemas import ignored
from deployments.schemas.body import AtMost, Body, wrong
from deployments.schemas.marks import MISTRAL
from deployments.schemas.told_tools import with_tools_told
from deployments.schemas.tools import (
    CalledFunction,
    Tool,
    ToolCall,
    call_format,
    has_place_for_tools,
    short_id,
    template_of,
)
from rapid.errors import InvalidRequest
from rapid.text.prompts import LONG_CONTENT_TOKENS, Message, Prompt, read_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextPart(Body):
    ignores = ignored.PART

    type: Literal["text"]
    text: str


class FileReference(Body):
    file_id: str | None = None
    file_data: str | None = Field(None, description="base64, or a data URL of it")
    filename: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> FileReference:
        if (self.file_id is None) == (self.file_data is None):
            raise wrong("", "give either file_id or file_data")
        return self

    def data(self, param: str) -> bytes:
        """The bytes of ``file_data``, a data URL or base64 alone.

        Raises:
            InvalidRequest: ``file_data`` is neither; the error names ``param``.
        """
        head, comma, tail = (self.file_data or "").partition(",")
        if head.startswith("data:") and not (comma and head.endswith(";base64")):
            raise InvalidRequest("file_data must be base64: data:<type>;base64,<data>", param=param)
        # Mail and many libraries break base64 into lines, and others leave the padding out.
        digits = "".join((tail if comma else head).split()).rstrip("=")
        try:
            return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
        except ValueError as error:  # of base64, or of characters that are not ASCII
            raise InvalidRequest(f"file_data is not base64: {error}", param=param) from error


class FilePart(Body):
    ignores = ignored.PART

    type: Literal["file"]
    file: FileReference


class DocumentText(TextPart):
    """The text of a file in the place of its file part (`deployments.files.attachments`)."""


def _kind(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return f"Part:{kind}"


# The discriminator chooses the kind before a part is read, so that an error names the wrong field and not every kind.
Part = Annotated[
    Annotated[TextPart, Tag("Part:text")] | Annotated[FilePart, Tag("Part:file")],
    Discriminator(_kind, custom_error_type="part", custom_error_message="text and file parts are read here"),
]
Content = Annotated[
    Annotated[str, Tag("Text")] | Annotated[list[Part], AtMost(1024), Tag("Parts")],
    Discriminator(lambda content: "Parts" if isinstance(content, list) else "Text"),
]


class ChatMessage(Body):
    ignores = ignored.MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = ""
    refusal: str | None = Field(None, description="read as the content of a message that has no other")
    reasoning_content: str | None = Field(None, description="for chat templates that show earlier reasoning")
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], AtMost(256)] = Field(default_factory=list)
    tool_call_id: str | None = None
    function_call: CalledFunction | None = Field(None, description="what tool_calls were once, as role function")

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if "content" not in self.model_fields_set and not self.calls and self.refusal is None:
            raise wrong("content", "is required")
        if self.calls and self.role != "assistant":
            raise wrong("tool_calls" if self.tool_calls else "function_call", "belong to role assistant")
        return self

    @property
    def calls(self) -> list[ToolCall]:
        """The calls in either form."""
        legacy = self.function_call
        return [*self.tool_calls, *([ToolCall(id=f"call_{legacy.name}", function=legacy)] if legacy else [])]

    @property
    def has_files(self) -> bool:
        return isinstance(self.content, list) and any(isinstance(part, FilePart) for part in self.content)

    def as_json(self) -> dict[str, Any]:
        """The message as a client would send it."""
        return self.model_dump(mode="json", exclude_unset=True, by_alias=True)

    def as_message(self) -> Message:
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        more: dict[str, Any] = self.given("name", "tool_call_id", "reasoning_content")
        if calls := self.calls:
            more["tool_calls"] = [call.for_template() for call in calls]
        if self.role == "function":
            more["tool_call_id"] = f"call_{self.name}"
        if isinstance(self.content, str):
            return Message(role, self.content or self.refusal or "", more)
        text, documents = "", []
        for i, part in enumerate(self.content):
            if isinstance(part, FilePart):
                raise InvalidRequest("a file was not read", param="messages")
            text += "\n\n" if i else ""
            if isinstance(part, DocumentText):
                documents.append((len(text), len(text) + len(part.text)))
            text += part.text
        return Message(role, text, more, tuple(documents))


def _with_short_ids(more: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a message, with calls named as Mistral's templates want it."""
    calls = [{**call, "id": short_id(call["id"])} for call in more.get("tool_calls", [])]
    result = {"tool_call_id": short_id(more["tool_call_id"])} if more.get("tool_call_id") else {}
    return {**more, **result} | ({"tool_calls": calls} if calls else {})


def read_messages(
    messages: Sequence[ChatMessage],
    tools: Sequence[Tool],
    tokenizer: PreTrainedTokenizerBase,
    *,
    query: str | None = None,
    long_content_tokens: int = LONG_CONTENT_TOKENS,
    template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    is_continued: bool = False,
    opens_turn: bool = True,
    special_tokens: bool = False,
    most_tokens: int | None = None,
) -> Prompt:
    """The prompt of a chat; ``template_kwargs`` are variables of the model's chat template.

    With ``is_continued`` the last message stays open; with ``opens_turn`` the assistant's turn begins behind it.
    ``special_tokens`` and ``most_tokens`` are those of `read_chat`.

    Raises:
        ContextLengthExceeded: the prompt has far more than ``most_tokens``.
        InvalidRequest: the chat template refuses the messages, or leaves out a variable.
    """
    own = {"messages", *signature(tokenizer.apply_chat_template).parameters}
    for name in template_kwargs:
        if name in own or not re.search(rf"\b{re.escape(name)}\b", template_of(tokenizer)):
            field = f"chat_template_kwargs.{name}"
            raise InvalidRequest(f"{field}: this model's chat template takes no such variable", param=field)
    turns = [message.as_message() for message in messages]
    if MISTRAL in template_of(tokenizer):
        turns = [turn._replace(more=_with_short_ids(turn.more)) for turn in turns]
    described = [tool.model_dump(exclude_unset=True) for tool in tools]
    if tools:
        call_format(tokenizer)
    if template_of(tokenizer) and not has_place_for_tools(tokenizer):
        turns, described = with_tools_told(turns, described, tokenizer), []
    return read_chat(
        turns,
        tokenizer,
        query=query,
        long_content_tokens=long_content_tokens,
        tools=described,
        template_kwargs={
            **template_kwargs,
            "add_generation_prompt": opens_turn,
            "continue_final_message": is_continued,
        },
        special_tokens=special_tokens,
        most_tokens=most_tokens,
    )
