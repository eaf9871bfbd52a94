"""The body of Anthropic's `POST /v1/messages`, and the chat that it asks for.

The chat is answered as any other (`deployments.schemas.chat.ChatRequest`). Fields are strict as there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, model_validator

from deployments.schemas import ignored
from deployments.schemas.body import MAX_NAME, AtMost, Body, wrong
from deployments.schemas.chat import ChatRequest
from deployments.schemas.messages import ChatMessage, DocumentText, FilePart, FileReference, TextPart
from deployments.schemas.rapid_fields import RapidFields
from deployments.schemas.reasoning import ThinkingOption
from deployments.schemas.response_format import AsSchema, JsonSchema
from deployments.schemas.tools import CalledFunction, Function, NamedFunction, NamedTool, Tool, ToolCall


class TextBlock(Body):
    ignores = ignored.BLOCK

    type: Literal["text"]
    text: str


class TextSource(Body):
    type: Literal["text"]
    media_type: Literal["text/plain"] = "text/plain"
    data: str


class Base64Source(Body):
    type: Literal["base64"]
    media_type: str = Field(max_length=MAX_NAME)
    data: str


class FileSource(Body):
    type: Literal["file"]
    file_id: str


class Document(Body):
    ignores = ignored.BLOCK

    type: Literal["document"]
    source: Annotated[TextSource | Base64Source | FileSource, Field(discriminator="type")]
    title: str | None = None
    context: str | None = None

    def parts(self) -> list[TextPart | FilePart]:
        """The document, behind what is said about it."""
        about = [TextPart(type="text", text=said) for said in (self.title, self.context) if said]
        source = self.source
        if isinstance(source, TextSource):
            return [*about, DocumentText(type="text", text=source.data)]
        if isinstance(source, FileSource):
            return [*about, FilePart(type="file", file=FileReference(file_id=source.file_id))]
        kind = {"application/pdf": "pdf", "text/html": "html", "text/markdown": "md"}.get(source.media_type, "txt")
        reference = FileReference(file_data=source.data, filename=f"document.{kind}")
        return [*about, FilePart(type="file", file=reference)]


class ToolUse(Body):
    ignores = ignored.BLOCK

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]

    def as_call(self) -> ToolCall:
        arguments = json.dumps(self.input, ensure_ascii=False)
        return ToolCall(id=self.id, function=CalledFunction(name=self.name, arguments=arguments))


class ToolResult(Body):
    ignores = ignored.BLOCK

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[TextBlock], AtMost(1024)] = ""
    is_error: bool = False

    def as_message(self) -> ChatMessage:
        text = self.content if isinstance(self.content, str) else "\n\n".join(part.text for part in self.content)
        return ChatMessage(role="tool", tool_call_id=self.tool_use_id, content="error: " * self.is_error + text)


class Thinking(Body):
    """What a model thought earlier: it is not read again."""

    ignores = ignored.THINKING

    type: Literal["thinking", "redacted_thinking"]


Block = Annotated[TextBlock | Document | ToolUse | ToolResult | Thinking, Discriminator("type")]


class Turn(Body):
    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], AtMost(1024)]

    def as_messages(self) -> list[ChatMessage]:
        """The turn as messages of a chat: results of tools are messages of their own."""
        if isinstance(self.content, str):
            return [ChatMessage(role=self.role, content=self.content)]
        results, parts, calls = [], [], []
        for block in self.content:
            if isinstance(block, ToolResult):
                results.append(block.as_message())
            elif isinstance(block, ToolUse):
                calls.append(block.as_call())
            elif isinstance(block, Document):
                parts += block.parts()
            elif isinstance(block, TextBlock):
                parts.append(TextPart(type="text", text=block.text))
        if parts or calls or not results:
            results.append(ChatMessage(role=self.role, content=parts, tool_calls=calls))
        return results


class MessagesTool(Body):
    ignores = ignored.BLOCK

    type: Literal["custom"] = "custom"
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool = False

    def as_tool(self) -> Tool:
        function = Function(
            name=self.name, description=self.description, parameters=self.input_schema, strict=self.strict
        )
        return Tool(type="function", function=function)


class MessagesToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _named(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise wrong("name", "goes with type tool, and with no other")
        return self

    def as_choice(self) -> Any:
        if self.name is not None:
            return NamedTool(type="function", function=NamedFunction(name=self.name))
        return {"any": "required"}.get(self.type, self.type)


class OutputFormat(Body):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")

    def as_format(self) -> AsSchema:
        return AsSchema(type="json_schema", json_schema=JsonSchema(name="output", schema=self.json_schema))


class OutputConfig(Body):
    ignores = ignored.OUTPUT_CONFIG

    format: OutputFormat | None = None


class _Turns(Body):
    """What is said, and what may be called: the fields that are counted."""

    chat_names: ClassVar[Mapping[str, str]] = {"response_format": "output_config.format", "stop": "stop_sequences"}

    model: str = Field(max_length=MAX_NAME)
    messages: Annotated[list[Turn], AtMost(4096)]
    system: str | Annotated[list[TextBlock], AtMost(1024)] = ""
    tools: Annotated[list[MessagesTool], AtMost(256)] = Field(default_factory=list)
    tool_choice: MessagesToolChoice = MessagesToolChoice(type="auto")
    thinking: ThinkingOption | None = None
    output_config: OutputConfig = OutputConfig()

    def chat_fields(self) -> dict[str, Any]:
        """The fields of a chat that both bodies ask for."""
        system = self.system if isinstance(self.system, str) else "\n\n".join(block.text for block in self.system)
        messages = [ChatMessage(role="system", content=system)] if system else []
        for turn in self.messages:
            messages += turn.as_messages()
        fields: dict[str, Any] = {"model": self.model, "messages": messages, **self.given("thinking")}
        if self.tools:
            fields["tools"] = [tool.as_tool() for tool in self.tools]
            fields["tool_choice"] = self.tool_choice.as_choice()
            fields["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        if self.output_config.format:
            fields["response_format"] = self.output_config.format.as_format()
        if self.messages and self.messages[-1].role == "assistant":  # the answer goes on with it
            fields |= {"continue_final_message": True, "add_generation_prompt": False}
        return fields


class CountTokens(_Turns):
    """`POST /v1/messages/count_tokens`."""

    def chat(self) -> ChatRequest:
        return ChatRequest(**self.chat_fields())


class MessagesRequest(_Turns):
    """`POST /v1/messages`."""

    ignores = ignored.MESSAGES

    max_tokens: int = Field(ge=1)
    stop_sequences: Annotated[list[str], AtMost(64)] = Field(default_factory=list)
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    rapid: RapidFields = RapidFields()

    def chat(self) -> ChatRequest:
        """The same request as a chat."""
        given = self.given("max_tokens", "stream", "temperature", "top_p", "top_k", "rapid")
        stops: dict[str, Any] = {"stop": self.stop_sequences} if self.stop_sequences else {}
        return ChatRequest(**self.chat_fields(), **given, **stops)
