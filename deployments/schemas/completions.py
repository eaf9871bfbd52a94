"""The bodies of completions, OpenAI's with a `rapid` object more, and the request that they make for the decode loop.

Every field is strict: a field that is unknown, or of the wrong type, is refused by name. Null counts as absent, since
clients send it for fields that they leave out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from deployments.config import AppConfig
from deployments.schemas.body import MAX_NAME, MAX_TOKENS, AtMost, Body, wrong
from deployments.schemas.messages import ChatMessage, FilePart, read_messages
from deployments.schemas.response_format import ResponseFormat
from deployments.schemas.tokenize import MAX_WINDOWS
from deployments.schemas.tools import Tool, ToolChoice, call_format, call_grammar
from rapid.errors import InvalidRequest
from rapid.request import GenerationRequest
from rapid.sampling.params import LogitParams
from rapid.speculation.params import SpeculationParams
from rapid.strategies import STRATEGIES, VERIFICATION_RULES
from rapid.text.prompts import Prompt, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LOGPROBS, MAX_STOPS = 20, 64


def _listed(summaries: Mapping[str, str]) -> str:
    return "; ".join(f"`{name}`: {summary}" for name, summary in summaries.items())


class RetrievalFields(Body):
    """`rapid.retrieval`: overrides of the configured retrieval options."""

    max_tokens: int | None = Field(None, ge=1)
    threshold: float | None = Field(None, ge=-1, le=1)
    chunk_tokens: int | None = Field(None, ge=16, description="each is embedded: small ones cost as much as large ones")
    keep: bool | None = None


class RapidFields(Body):
    """The `rapid` object of a request: overrides of the configured speculation."""

    strategy: str | None = Field(None, description=_listed({s.name: s.summary for s in STRATEGIES.values()}))
    num_draft_tokens: int | Literal["auto"] | None = None
    transfer_strength: float | None = None
    verification: str | None = Field(None, description=_listed(VERIFICATION_RULES))
    draft_top_k: int | None = None
    draft_vocabulary: int | Literal["auto", "full"] | None = None
    rag_model: str | None = None
    query: str | None = None
    retrieval: RetrievalFields = RetrievalFields()
    trace: bool = Field(False, description="with each chunk of a stream, the round that wrote it")


class StreamOptions(Body):
    include_usage: bool = False


class Completion(Body):
    """The fields that both endpoints take."""

    model: str = Field(max_length=MAX_NAME)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], AtMost(1024)] = Field(default_factory=list)
    stop_token_ids: Annotated[list[int], AtMost(1024)] = Field(default_factory=list)
    min_tokens: int = Field(0, ge=0)
    n: int = Field(1, ge=1)
    # JSON's keys are strings.
    logit_bias: Annotated[dict[Annotated[int, Field(strict=False)], float], AtMost(1024)] = Field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    user: str | None = None
    rapid: RapidFields = RapidFields()

    @model_validator(mode="after")
    def _stop_strings(self) -> Completion:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if len(stop) > MAX_STOPS or not all(stop):
            raise wrong("stop", f"must be one to {MAX_STOPS} strings, none of them empty")
        return self

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Completion:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise wrong("stream_options", "says how to stream, and stream is false")
        if self.rapid.trace and not self.stream:
            raise wrong("rapid.trace", "tells of a stream's rounds: set stream to true")
        return self

    @property
    def tools_in_use(self) -> list[Tool]:
        """The tools that the model may call."""
        return []

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens come with each token; None where no log-probabilities are asked for."""

    def echoed(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The part of the prompt that is repeated before the answer."""
        return ""

    def read(
        self, tokenizer: PreTrainedTokenizerBase, config: AppConfig, window: int | None = None
    ) -> GenerationRequest:
        """This request with the configured defaults filled in; ``window`` is the target's, if it is known.

        Raises:
            ContextLengthExceeded: the prompt is far beyond the window, or `MAX_WINDOWS` of them where the target reads
                what is retrieved.
            InvalidRequest: a value is out of range, the prompt is empty or refused by the chat template, or a schema
                cannot be enforced.
        """
        if self.n > config.target.max_sequences:
            raise InvalidRequest(f"n must be at most {config.target.max_sequences}, got {self.n}", param="n")
        most = self.tokens_to_write() or config.default_max_tokens
        if self.min_tokens > most:
            raise InvalidRequest(f"min_tokens must be at most {most}, got {self.min_tokens}", param="min_tokens")
        unknown = [token for token in self.stop_token_ids if not 0 <= token < len(tokenizer)]
        if unknown:
            raise InvalidRequest(f"stop_token_ids: there is no token {unknown[0]}", param="stop_token_ids")
        grammar = self._grammar(tokenizer)
        for param in ("ignore_eos", "min_tokens"):
            if grammar and getattr(self, param):
                raise InvalidRequest(f"{param}: what follows a grammar ends where that ends", param=param)
        stop_token_ids = tuple(self.stop_token_ids)
        adjustments = self.given("logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty")
        rapid = self.rapid.given(*(field.name for field in fields(SpeculationParams)))
        retrieval = self.rapid.retrieval.given("max_tokens", "threshold", "chunk_tokens", "keep")
        speculation = replace(config.speculation, **rapid)
        most_tokens = window
        if window is not None and STRATEGIES[speculation.strategy].reads == "retrieved":
            most_tokens = MAX_WINDOWS * window
        return GenerationRequest(
            sampling=replace(config.sampling, **self.given("temperature", "top_p", "top_k", "min_p", "seed")),
            speculation=speculation,
            retrieval=replace(config.retriever.options, **retrieval),
            prompt=self._prompt(
                tokenizer,
                long_content_tokens=config.retriever.long_content_tokens,
                special_tokens=config.special_tokens_in_text,
                most_tokens=most_tokens,
            ),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_token_ids=stop_token_ids,
            min_tokens=self.min_tokens,
            max_tokens=self.tokens_to_write(),
            default_max_tokens=config.default_max_tokens,
            logits=LogitParams(
                **adjustments,
                grammar=grammar,
                min_tokens=self.min_tokens,
                stop_token_ids=stop_token_ids if self.min_tokens else (),
            ),
            ignore_eos=self.ignore_eos,
            num_logprobs=self.num_logprobs,
        )

    @abstractmethod
    def _prompt(self, tokenizer: PreTrainedTokenizerBase, **how: Any) -> Prompt:
        """The prompt; ``how`` are the options that `read_chat` and `read_text` have in common."""

    def tokens_to_write(self) -> int | None:
        return self.max_tokens

    def _grammar(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        return self.response_format.grammar() if self.response_format else None


class ChatRequest(Completion):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], AtMost(4096)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    tools: Annotated[list[Tool], AtMost(256)] = Field(default_factory=list)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _belong_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs", "needs logprobs to be true")
        for param in ("tool_choice", "parallel_tool_calls"):
            if param in self.model_fields_set and not self.tools:
                raise wrong(param, "needs tools")
        if {"max_tokens", "max_completion_tokens"} <= self.model_fields_set:
            raise wrong("max_completion_tokens", "means the same as max_tokens; send one")
        if self.tools_in_use and self.response_format and self.response_format.type != "text":
            raise wrong("response_format", "cannot be had together with tools; set tool_choice to none")
        return self

    @property
    def tools_in_use(self) -> list[Tool]:
        return [] if self.tool_choice == "none" else self.tools

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def has_files(self) -> bool:
        contents = [message.content for message in self.messages]
        return any(isinstance(part, FilePart) for parts in contents for part in parts)

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, **how: Any) -> Prompt:
        return read_messages(
            self.messages,
            self.tools_in_use,
            tokenizer,
            template_kwargs=self.chat_template_kwargs,
            query=self.rapid.query,
            **how,
        )

    def _grammar(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        if self.tools_in_use:
            form = call_format(tokenizer)
            return call_grammar(self.tools, self.tool_choice, form, several=self.parallel_tool_calls)
        return super()._grammar(tokenizer)

    def tokens_to_write(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextRequest(Completion):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], AtMost(1024)]
        | Annotated[list[int], AtMost(MAX_TOKENS)]
        | Annotated[list[Annotated[list[int], AtMost(MAX_TOKENS)]], AtMost(1024)]
    ) = Field(description="one prompt; a list may hold one")
    max_tokens: int | None = Field(None, ge=0, description="0 with echo: the prompt alone")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    best_of: int | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> TextRequest:
        is_of_tokens = bool(self.prompt) and isinstance(self.prompt[0], int)
        if isinstance(self.prompt, list) and len(self.prompt) != 1 and not is_of_tokens:
            raise wrong("prompt", "must be one prompt; send several as several requests")
        if self.max_tokens == 0 and not self.echo:
            raise wrong("max_tokens", "must be greater than 0 without echo")
        if self.echo and self.logprobs is not None:
            raise wrong("echo", "the prompt's logprobs are not computed; leave echo or logprobs out")
        if self.best_of not in (None, self.n):
            raise wrong("best_of", "must be n: all that is written is given out")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def echoed(self, tokenizer: PreTrainedTokenizerBase) -> str:
        if not self.echo:
            return ""
        prompt = self._one
        return prompt if isinstance(prompt, str) else str(tokenizer.decode(prompt))

    @property
    def _one(self) -> str | list[int]:
        """The prompt, as text or as tokens."""
        prompt: Any = self.prompt
        one: str | list[int] = prompt[0] if isinstance(prompt, list) and not isinstance(prompt[0], int) else prompt
        return one

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, **how: Any) -> Prompt:
        return read_text(self._one, tokenizer, query=self.rapid.query, **how)


class Health(BaseModel):
    """`GET /health`: each engine's model, open sequences, the bytes their KV caches hold, and the age of its pass.

    With ``problems`` (part → what is wrong, of the parts that requests can do without) ``status`` is "degraded".
    """

    status: Literal["ok", "degraded"]
    models: dict[str, str]
    sequences: dict[str, int]
    kv_bytes: dict[str, int]
    pass_age_s: dict[str, float]
    problems: dict[str, str]
