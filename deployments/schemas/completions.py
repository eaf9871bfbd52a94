"""The bodies of completions, OpenAI's with a `rapid` object more, and the request that they make for the decode loop.

Every field is strict: a field that is unknown, or of the wrong type, is refused by name. Null counts as absent, since
clients send it for fields that they leave out, and so does -1 where other servers mean "without a limit" by it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from deployments.config import AppConfig
from deployments.schemas import ignored
from deployments.schemas.body import MAX_NAME, MAX_TOKENS, AtMost, Body, wrong
from deployments.schemas.messages import ChatMessage, FilePart, read_messages
from deployments.schemas.response_format import ResponseFormat, StructuredOutputs
from deployments.schemas.tokenize import MAX_WINDOWS
from deployments.schemas.tools import (
    Function,
    NamedFunction,
    NamedTool,
    Tool,
    ToolChoice,
    call_format,
    call_grammar,
)
from rapid.errors import InvalidRequest
from rapid.request import GenerationRequest
from rapid.sampling.params import LogitParams
from rapid.speculation.params import NUM_ANSWER_CHUNKS, SpeculationParams
from rapid.strategies import STRATEGIES, VERIFICATION_RULES
from rapid.text.prompts import Prompt, read_text
from retrieval import Method

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LOGPROBS, MAX_STOPS = 20, 64
MAX_CHUNKS = 8192  # of a context, about: each costs a forward pass of the embedder
_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")  # vLLM's until 0.11
_FORMS = ("response_format", "structured_outputs", *_GUIDED)


def _listed(summaries: Mapping[str, str]) -> str:
    return "; ".join(f"`{name}`: {summary}" for name, summary in summaries.items())


class RetrievalFields(Body):
    """`rapid.retrieval`: overrides of the configured retrieval options."""

    method: Method | None = None
    max_tokens: int | None = Field(None, ge=16, description="no chunk is longer")
    threshold: float | None = Field(None, ge=-1, le=1)
    chunk_tokens: int | None = Field(None, ge=16, description="each is embedded: small ones cost as much as large ones")
    rerank_candidates: int | None = Field(None, ge=1, le=256)
    keep: bool | None = None


class RapidFields(Body):
    """The `rapid` object of a request: overrides of the configured speculation."""

    strategy: str | None = Field(None, description=_listed({s.name: s.summary for s in STRATEGIES.values()}))
    num_draft_tokens: int | Literal["auto"] | None = None
    transfer_strength: float | Literal["auto"] | None = None
    transfer_temperature: float | None = Field(None, description="of p and q at temperature 0; 0: no transfer there")
    transfer_divergence: float | None = Field(None, description="with η auto: KL(p̂‖p) in nats, at most")
    verification: str | None = Field(None, description=_listed(VERIFICATION_RULES))
    draft_top_k: int | None = None
    refresh: Literal["off", "auto"] | None = Field(None, description="auto: retrieves anew while the answer is written")
    draft_vocabulary: int | Literal["auto", "full"] | None = None
    rag_model: str | None = None
    num_answers: int | None = None
    num_clusters: int | None = None
    draft_cache: str | None = None
    draft_cache_tokens: int | None = None
    query: str | None = None
    retrieval: RetrievalFields = RetrievalFields()
    trace: bool = Field(False, description="with each chunk of a stream, the round that wrote it")


class StreamOptions(Body):
    ignores = ignored.STREAM_OPTIONS

    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="with include_usage: the usage so far on every chunk")

    @model_validator(mode="after")
    def _usage_of_what(self) -> StreamOptions:
        if self.continuous_usage_stats and not self.include_usage:
            raise wrong("continuous_usage_stats", "needs include_usage to be true")
        return self


class Completion(Body):
    """The fields that both endpoints take."""

    ignores = ignored.COMPLETION
    limits = frozenset(("max_tokens", "max_completion_tokens", "top_k"))

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
    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM's; or one of the guided_… fields")
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], AtMost(1024)] | None = None
    guided_grammar: str | None = None
    truncate_prompt_tokens: int | None = Field(
        None, ge=1, description="the target reads the prompt's last tokens, and no more of them"
    )
    user: str | None = None
    rapid: RapidFields = RapidFields()

    @model_validator(mode="after")
    def _stop_strings(self) -> Completion:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if len(stop) > MAX_STOPS or not all(stop):
            raise wrong("stop", f"must be one to {MAX_STOPS} strings, none of them empty")
        return self

    @model_validator(mode="after")
    def _one_form(self) -> Completion:
        forms = [name for name in _FORMS if name in self.model_fields_set]
        if len(forms) > 1:
            raise wrong(forms[1], f"goes without {forms[0]}")
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

    @property
    def num_prompts(self) -> int:
        return 1

    def each(self) -> Sequence[Completion]:
        """For each prompt a completion of its own."""
        return [self]

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
        retrieval = self.rapid.retrieval.given(*RetrievalFields.model_fields)
        speculation = replace(config.speculation, **rapid)
        options = replace(config.retriever.options, **retrieval)
        if STRATEGIES[speculation.strategy].chooses:
            if self.num_logprobs is not None:
                message = f"{speculation.strategy} chooses between whole answers, and gives no log-probabilities"
                raise InvalidRequest(message, param="logprobs")
            if options.max_tokens is None:  # room for as many chunks as the answers are drafted from
                options = replace(options, max_tokens=NUM_ANSWER_CHUNKS * options.chunk_tokens)
        most_tokens = window
        cut = self.truncate_prompt_tokens is not None
        if window is not None and (cut or STRATEGIES[speculation.strategy].reads == "retrieved"):
            most_tokens = MAX_WINDOWS * window
        prompt = self._prompt(
            tokenizer,
            long_content_tokens=config.retriever.long_content_tokens,
            special_tokens=config.special_tokens_in_text,
            most_tokens=most_tokens,
        )
        if prompt.contents and len(prompt.tokens) > MAX_CHUNKS * options.longest_chunk:
            needed = (
                f"{len(prompt.tokens)} tokens are read in chunks of at least {len(prompt.tokens) // MAX_CHUNKS + 1}"
            )
            raise InvalidRequest(f"{needed}, got {options.longest_chunk}", param="rapid.retrieval.chunk_tokens")
        return GenerationRequest(
            sampling=replace(config.sampling, **self.given("temperature", "top_p", "top_k", "min_p", "seed")),
            speculation=speculation,
            retrieval=options,
            prompt=self._truncated(prompt),
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

    def _truncated(self, prompt: Prompt) -> Prompt:
        most = self.truncate_prompt_tokens
        return replace(prompt, tokens=prompt.tokens[-most:]) if most else prompt

    def tokens_to_write(self) -> int | None:
        return self.max_tokens

    def _grammar(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        form = self.response_format or self.structured_outputs
        for name, value in self.given(*_GUIDED).items():
            form = StructuredOutputs.model_validate({name.removeprefix("guided_"): value})
        return form.grammar() if form else None


class ChatRequest(Completion):
    """`POST /v1/chat/completions`."""

    ignores = ignored.CHAT

    messages: Annotated[list[ChatMessage], AtMost(4096)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    tools: Annotated[list[Tool], AtMost(256)] = Field(default_factory=list)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    functions: Annotated[list[Function], AtMost(256)] = Field(default_factory=list, description="what tools were once")
    function_call: Literal["none", "auto"] | NamedFunction = "auto"
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = Field(False, description="the answer goes on with the last message")

    @model_validator(mode="after")
    def _continues(self) -> ChatRequest:
        if self.continue_final_message:
            if "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt:
                raise wrong("continue_final_message", "needs add_generation_prompt to be false")
            if not self.messages or self.messages[-1].role != "assistant":
                raise wrong("continue_final_message", "needs a last message of role assistant")
        return self

    @model_validator(mode="after")
    def _belong_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs", "needs logprobs to be true")
        if self.tool_choice not in ("none", "auto") and not self.tools:
            raise wrong("tool_choice", "needs tools")
        if self.functions and self.tools:
            raise wrong("functions", "are what tools were once; send one of both")
        if isinstance(self.function_call, NamedFunction) and not self.functions:
            raise wrong("function_call", "needs functions")
        forms = self.given(*_FORMS)
        if self.tools_in_use and any(getattr(form, "type", None) != "text" for form in forms.values()):
            raise wrong(next(iter(forms)), "cannot be had together with tools; set tool_choice to none")
        return self

    @property
    def tools_in_use(self) -> list[Tool]:
        if self.functions:
            wanted = self.function_call != "none"
            return [Tool(type="function", function=function) for function in self.functions] if wanted else []
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
            is_continued=self.continue_final_message,
            opens_turn=self.add_generation_prompt and not self.continue_final_message,
            query=self.rapid.query,
            **how,
        )

    def _grammar(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        if self.tools_in_use:
            form = call_format(tokenizer)
            choice, several = self.tool_choice, self.parallel_tool_calls and not self.functions
            if isinstance(self.function_call, NamedFunction):
                choice = NamedTool(type="function", function=self.function_call)
            return call_grammar(self.tools_in_use, choice, form, several=several)
        return super()._grammar(tokenizer)

    def tokens_to_write(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextRequest(Completion):
    """`POST /v1/completions`."""

    ignores = ignored.TEXT

    prompt: (
        str
        | Annotated[list[str], AtMost(1024)]
        | Annotated[list[int], AtMost(MAX_TOKENS)]
        | Annotated[list[Annotated[list[int], AtMost(MAX_TOKENS)]], AtMost(1024)]
    ) = Field(description="a prompt, or several, as texts or as tokens")
    max_tokens: int | None = Field(None, ge=0, description="0 with echo: the prompt alone")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    best_of: int | None = None

    @model_validator(mode="after")
    def _belong_together(self) -> TextRequest:
        if self.prompt == []:
            raise wrong("prompt", "must hold a prompt")
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
        prompt = self._prompts[0]
        return prompt if isinstance(prompt, str) else str(tokenizer.decode(prompt))

    @property
    def _prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or as tokens."""
        prompt: Any = self.prompt
        several: list[str | list[int]] = prompt
        return several if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]

    @property
    def num_prompts(self) -> int:
        return len(self._prompts)

    def each(self) -> Sequence[Completion]:
        prompts = self._prompts
        return [self.model_copy(update={"prompt": prompt}) for prompt in prompts] if len(prompts) > 1 else [self]

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, **how: Any) -> Prompt:
        return read_text(self._prompts[0], tokenizer, query=self.rapid.query, **how)


class Health(BaseModel):
    """`GET /health`: by role the model, open sequences, the bytes their KV caches hold, and the age of the oldest pass.

    With ``problems`` (part → what is wrong, of the parts that requests can do without) ``status`` is "degraded".
    """

    status: Literal["ok", "degraded"]
    models: dict[str, str]
    sequences: dict[str, int]
    kv_bytes: dict[str, int]
    pass_age_s: dict[str, float]
    problems: dict[str, str]
