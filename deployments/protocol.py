"""The HTTP bodies, OpenAI's with a `rapid` object more, and what a completion request means to the decode loop.

Every field is strict: one that is unknown, or of the wrong type, is refused by name. A field set to null counts as
absent, since clients send those.
"""

from abc import abstractmethod
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from transformers import PreTrainedTokenizerBase

from deployments.config import AppConfig
from rapid.prompts import Message, Prompt, read_chat, read_text
from rapid.request import GenerationRequest, Statistics


class Body(BaseModel):
    """Base of everything a client sends."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the named fields that the client sent."""
        return {name: getattr(self, name) for name in names if name in self.model_fields_set}


class RetrievalFields(Body):
    """`rapid.retrieval`: overrides of the configured retrieval options."""

    max_tokens: int | None = Field(None, ge=1)
    threshold: float | None = Field(None, ge=-1, le=1)
    chunk_tokens: int | None = Field(None, ge=1)
    keep: bool | None = None


class RapidFields(Body):
    """The `rapid` object of a request: overrides of the configured speculation."""

    strategy: str | None = None
    num_draft_tokens: int | Literal["auto"] | None = None
    transfer_strength: float | None = None
    verification: str | None = None
    draft_top_k: int | None = None
    rag_model: str | None = None
    query: str | None = None
    retrieval: RetrievalFields = RetrievalFields()


class StreamOptions(Body):
    include_usage: bool = False


class Completion(Body):
    """What both endpoints take."""

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] = Field(default_factory=list)
    n: Literal[1] = 1
    user: str | None = None
    rapid: RapidFields = RapidFields()

    @model_validator(mode="after")
    def _stop_strings(self) -> "Completion":
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if len(stop) > 4 or not all(stop):
            raise ValueError("stop must be one to four strings, none of them empty")
        return self

    def read(self, tokenizer: PreTrainedTokenizerBase, config: AppConfig) -> GenerationRequest:
        """This request with the configured defaults filled in.

        Raises:
            InvalidRequest: a value is out of range, or the prompt is empty or refused by the chat template.
        """
        rapid = self.rapid.given(
            "strategy", "num_draft_tokens", "transfer_strength", "verification", "draft_top_k", "rag_model"
        )
        retrieval = self.rapid.retrieval.given("max_tokens", "threshold", "chunk_tokens", "keep")
        return GenerationRequest(
            sampling=replace(config.sampling, **self.given("temperature", "top_p", "top_k", "min_p", "seed")),
            speculation=replace(config.speculation, **rapid),
            retrieval=replace(config.retriever.options, **retrieval),
            prompt=self._prompt(tokenizer, config.retriever.long_content_tokens),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            max_tokens=self._max_tokens(),
            default_max_tokens=config.default_max_tokens,
        )

    @abstractmethod
    def _prompt(self, tokenizer: PreTrainedTokenizerBase, long_content_tokens: int) -> Prompt: ...

    def _max_tokens(self) -> int | None:
        return self.max_tokens


class TextPart(Body):
    type: Literal["text"]
    text: str


class FileReference(Body):
    file_id: str | None = None
    file_data: str | None = Field(None, description="base64, or a data URL of it")
    filename: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "FileReference":
        if (self.file_id is None) == (self.file_data is None):
            raise ValueError("give either file_id or file_data")
        return self


class FilePart(Body):
    type: Literal["file"]
    file: FileReference


class DocumentText(TextPart):
    """What takes a file part's place once the file has been read (`deployments.files`)."""


def _kind(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return f"Part:{kind}"


# Told apart before they are read, so that an error names the field that is wrong and not every kind there is.
Part = Annotated[
    Annotated[TextPart, Tag("Part:text")] | Annotated[FilePart, Tag("Part:file")],
    Discriminator(_kind, custom_error_type="part", custom_error_message="text and file parts are read here"),
]
Content = Annotated[
    Annotated[str, Tag("Text")] | Annotated[list[Part], Tag("Parts")],
    Discriminator(lambda content: "Parts" if isinstance(content, list) else "Text"),
]


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content

    def as_message(self) -> Message:
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return Message(role, self.content)
        text, documents = "", []
        for i, part in enumerate(self.content):
            assert isinstance(part, TextPart)
            text += "\n\n" if i else ""
            if isinstance(part, DocumentText):
                documents.append((len(text), len(text) + len(part.text)))
            text += part.text
        return Message(role, text, tuple(documents))


class ChatRequest(Completion):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def has_files(self) -> bool:
        contents = [message.content for message in self.messages]
        return any(isinstance(part, FilePart) for parts in contents for part in parts)

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, long_content_tokens: int) -> Prompt:
        messages = [message.as_message() for message in self.messages]
        return read_chat(messages, tokenizer, query=self.rapid.query, long_content_tokens=long_content_tokens)

    def _max_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextRequest(Completion):
    """`POST /v1/completions`."""

    prompt: str | list[str] = Field(description="one prompt; a list may hold one")

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, long_content_tokens: int) -> Prompt:
        prompt = self.prompt if isinstance(self.prompt, str) else self.prompt[0]
        return read_text(prompt, tokenizer, query=self.rapid.query, long_content_tokens=long_content_tokens)

    @model_validator(mode="after")
    def _one_prompt(self) -> "TextRequest":
        if isinstance(self.prompt, list) and len(self.prompt) != 1:
            raise ValueError("prompt must be one string; send several prompts as several requests")
        return self


class Health(BaseModel):
    """`GET /health`: each engine's model, open sequences, and the bytes their KV caches hold."""

    status: str
    models: dict[str, str]
    sequences: dict[str, int]
    kv_bytes: dict[str, int]


def rapid_object(statistics: Statistics) -> dict[str, Any]:
    """The `rapid` object of an answer: the statistics, rates and times rounded for reading."""
    fields = asdict(statistics)
    fields["timings_ms"] = {name: round(ms, 2) for name, ms in statistics.timings_ms.items()}
    for rate in ("acceptance_rate", "mean_accepted_length"):
        value = getattr(statistics, rate)
        fields[rate] = None if value is None else round(value, 4)
    return fields


def usage(statistics: Statistics) -> dict[str, Any]:
    """OpenAI's `usage`: the prompt as the client sent it, how much of it was known already, and the tokens written."""
    prompt, written = statistics.prompt_tokens, statistics.emitted
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": statistics.cached_tokens},
    }
