"""What the bodies of completions have in common, OpenAI's with a `rapid` object more, and the request that they make.

Every field is strict: a field that is unknown, or of the wrong type, is refused by name. Null counts as absent, since
clients send it for fields that they leave out, and so does -1 where other servers mean "without a limit" by it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError, model_validator

from deployments.config import AppConfig
from deployments.schemas import ignored
from deployments.schemas.body import MAX_NAME, AtMost, Body, wrong
from deployments.schemas.rapid_fields import RapidFields, RetrievalFields
from deployments.schemas.reasoning import ReasoningFormat
from deployments.schemas.response_format import ResponseFormat, StructuredOutputs
from deployments.schemas.tokenize import MAX_WINDOWS
from deployments.schemas.tools import Tool
from rapid.errors import InvalidRequest
from rapid.request import GenerationRequest
from rapid.sampling.params import LogitParams
from rapid.speculation.params import NUM_ANSWER_CHUNKS, SpeculationParams
from rapid.strategies import STRATEGIES
from rapid.text.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LOGPROBS, MAX_STOPS, MAX_STOP_CHARACTERS = 20, 64, 4096
MAX_CHUNKS = 8192  # of a context, about: each costs a forward pass of the embedder
_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")  # vLLM's until 0.11
FORMS = ("response_format", "structured_outputs", *_GUIDED)


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
        if len(stop) > MAX_STOPS or not all(0 < len(one) <= MAX_STOP_CHARACTERS for one in stop):
            raise wrong("stop", f"must be one to {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters")
        return self

    @model_validator(mode="after")
    def _one_form(self) -> Completion:
        forms = [name for name in FORMS if name in self.model_fields_set]
        if len(forms) > 1:
            raise wrong(forms[1], f"goes without {forms[0]}")
        for name, form in self._guided():
            try:
                StructuredOutputs.model_validate(form)
            except ValidationError as error:
                raise wrong(name, error.errors(include_url=False)[0]["msg"]) from error
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
    def num_prompt_logprobs(self) -> int | None:
        """The same of the prompt's own tokens."""
        return None

    @property
    def num_written(self) -> int:
        """How many choices are written for each prompt; the best ``n`` of them are given out."""
        return self.n

    @property
    def num_prompts(self) -> int:
        return 1

    def each(self) -> Sequence[Completion]:
        """For each prompt a completion of its own."""
        return [self]

    def reasoning(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> ReasoningFormat | None:
        """How the answer's reasoning is marked; None where it is text like any other."""
        return None

    def shown_tokens(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """The special tokens whose text is needed to read the answer."""
        return frozenset()

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
        if self.num_written > config.target.max_sequences:
            param = "best_of" if self.num_written > self.n else "n"
            message = f"{param} must be at most {config.target.max_sequences}, got {self.num_written}"
            raise InvalidRequest(message, param=param)
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
            if self.num_logprobs is not None or self.num_written > self.n:
                param = "best_of" if self.num_logprobs is None else "logprobs"
                message = f"{speculation.strategy} chooses between whole answers, and gives no log-probabilities"
                raise InvalidRequest(f"{param}: {message}", param=param)
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
        if grammar and (reasoning := self.reasoning(tokenizer, prompt)):
            grammar = reasoning.before(grammar)
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
            shown_tokens=self.shown_tokens(tokenizer),
            num_logprobs=0 if self.num_logprobs is None and self.num_written > self.n else self.num_logprobs,
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
        for _, guided in self._guided():
            form = StructuredOutputs.model_validate(guided)
        return form.grammar() if form else None

    def _guided(self) -> list[tuple[str, dict[str, Any]]]:
        """(field, what it is in the newer form) of each `guided_…` field."""
        return [(name, {name.removeprefix("guided_"): value}) for name, value in self.given(*_GUIDED).items()]
