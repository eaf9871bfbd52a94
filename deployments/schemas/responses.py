"""The body of OpenAI's `POST /v1/responses`, and the chat that it asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from deployments.schemas import ignored
from deployments.schemas.body import MAX_NAME, AtMost, Body
from deployments.schemas.chat import ChatRequest
from deployments.schemas.completions import StreamOptions
from deployments.schemas.messages import ChatMessage, FilePart, FileReference, TextPart
from deployments.schemas.rapid_fields import RapidFields
from deployments.schemas.response_format import AsObject, AsSchema, AsText, JsonSchema
from deployments.schemas.tools import CalledFunction, Function, NamedFunction, NamedTool, Tool, ToolCall


class InputText(Body):
    ignores = ignored.ITEM_PART

    type: Literal["input_text", "output_text"]
    text: str

    def as_part(self) -> TextPart | FilePart:
        return TextPart(type="text", text=self.text)


class InputFile(FileReference):
    ignores = ignored.ITEM_PART

    type: Literal["input_file"]

    def as_part(self) -> TextPart | FilePart:
        return FilePart(type="file", file=FileReference(**self.given("file_id", "file_data", "filename")))


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str

    def as_part(self) -> TextPart | FilePart:
        return TextPart(type="text", text=self.refusal)


ContentPart = Annotated[InputText | InputFile | RefusalPart, Discriminator("type")]


class InputMessage(Body):
    ignores = ignored.ITEM

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], AtMost(1024)]

    def as_message(self) -> ChatMessage:
        content = self.content if isinstance(self.content, str) else [part.as_part() for part in self.content]
        return ChatMessage(role=self.role, content=content)


class FunctionCallItem(Body):
    ignores = ignored.ITEM

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str

    def as_message(self) -> ChatMessage:
        call = ToolCall(id=self.call_id, function=CalledFunction(name=self.name, arguments=self.arguments))
        return ChatMessage(role="assistant", tool_calls=[call])


class FunctionCallOutput(Body):
    ignores = ignored.ITEM

    type: Literal["function_call_output"]
    call_id: str
    output: str | Annotated[list[InputText], AtMost(1024)]

    def as_message(self) -> ChatMessage:
        text = self.output if isinstance(self.output, str) else "\n\n".join(part.text for part in self.output)
        return ChatMessage(role="tool", tool_call_id=self.call_id, content=text)


class ReasoningItem(Body):
    """What a model thought earlier: it is not read again."""

    ignores = ignored.REASONING_ITEM

    type: Literal["reasoning"]

    def as_message(self) -> None:
        return None


def _kind(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return f"Item:{kind}"


Item = Annotated[
    Annotated[InputMessage, Tag("Item:message")]
    | Annotated[FunctionCallItem, Tag("Item:function_call")]
    | Annotated[FunctionCallOutput, Tag("Item:function_call_output")]
    | Annotated[ReasoningItem, Tag("Item:reasoning")],
    Discriminator(
        _kind,
        custom_error_type="item",
        custom_error_message="messages, function_call, function_call_output and reasoning are read here",
    ),
]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    name: str
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool = True

    def as_format(self) -> AsSchema:
        schema = JsonSchema(name=self.name, schema=self.json_schema)
        return AsSchema(type="json_schema", json_schema=schema)


class TextOptions(Body):
    ignores = ignored.TEXT_OPTIONS

    format: Annotated[AsText | AsObject | SchemaFormat, Field(discriminator="type")] = AsText(type="text")


class FunctionTool(Body):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False

    def as_tool(self) -> Tool:
        function = Function(**self.given("name", "description", "parameters", "strict"))
        return Tool(type="function", function=function)


class NamedFunctionTool(Body):
    type: Literal["function"]
    name: str


class ResponsesRequest(Body):
    """`POST /v1/responses`."""

    ignores = ignored.RESPONSES
    chat_names: ClassVar[Mapping[str, str]] = {"response_format": "text.format"}

    model: str = Field(max_length=MAX_NAME)
    input: str | Annotated[list[Item], AtMost(4096)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    metadata: Annotated[dict[str, str], AtMost(16)] = Field(default_factory=dict)
    parallel_tool_calls: bool = True
    previous_response_id: str | None = Field(None, max_length=MAX_NAME)
    store: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    text: TextOptions = TextOptions()
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool = "auto"
    tools: Annotated[list[FunctionTool], AtMost(256)] = Field(default_factory=list)
    top_p: float | None = None
    user: str | None = None
    rapid: RapidFields = RapidFields()

    def messages(self) -> list[ChatMessage]:
        """The messages of ``input``; calls beside one another are one message."""
        if isinstance(self.input, str):
            return [ChatMessage(role="user", content=self.input)]
        messages: list[ChatMessage] = []
        for item in self.input:
            message = item.as_message()
            if message is None:
                continue
            before = messages[-1] if messages else None
            if message.tool_calls and before is not None and before.role == "assistant":
                messages[-1] = before.model_copy(update={"tool_calls": [*before.tool_calls, *message.tool_calls]})
            else:
                messages.append(message)
        return messages

    def chat(self, earlier: Sequence[ChatMessage]) -> ChatRequest:
        """The same request as a chat that goes on after ``earlier`` messages, without their instructions."""
        told = [ChatMessage(role="system", content=self.instructions)] if self.instructions else []
        fields: dict[str, Any] = {"model": self.model, "messages": [*told, *earlier, *self.messages()]}
        fields |= self.given("stream", "temperature", "top_p", "user", "rapid")
        if self.max_output_tokens is not None:
            fields["max_completion_tokens"] = self.max_output_tokens
        form = self.text.format
        if not isinstance(form, AsText):
            fields["response_format"] = form.as_format() if isinstance(form, SchemaFormat) else form
        if self.tools:
            fields["tools"] = [tool.as_tool() for tool in self.tools]
            fields["parallel_tool_calls"] = self.parallel_tool_calls
            fields["tool_choice"] = self.tool_choice
            if isinstance(self.tool_choice, NamedFunctionTool):
                named = NamedFunction(name=self.tool_choice.name)
                fields["tool_choice"] = NamedTool(type="function", function=named)
        return ChatRequest(**fields)
