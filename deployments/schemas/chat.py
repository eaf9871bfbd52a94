"""The body of `POST /v1/chat/completions`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from deployments.schemas import ignored
from deployments.schemas.body import AtMost, wrong
from deployments.schemas.completions import FORMS, MAX_LOGPROBS, Completion
from deployments.schemas.marks import special_marks
from deployments.schemas.messages import ChatMessage, read_messages
from deployments.schemas.reasoning import ReasoningFormat, ThinkingOption, reasoning_format
from deployments.schemas.tokenize import MAX_WINDOWS, Tokenized
from deployments.schemas.tools import (
    Function,
    NamedFunction,
    NamedTool,
    Tool,
    ToolChoice,
    call_format,
    call_grammar,
)
from rapid.text.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    thinking: ThinkingOption | None = Field(None, description="whether to reason, where the model can do otherwise")
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
        forms = self.given(*FORMS)
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

    def tokenized(self, tokenizer: PreTrainedTokenizerBase, window: int, *, special_tokens: bool = False) -> Tokenized:
        """The prompt's tokens, as `TokenizeRequest.tokenized`."""
        tokens = self._prompt(tokenizer, special_tokens=special_tokens, most_tokens=MAX_WINDOWS * window).tokens
        return Tokenized(count=len(tokens), max_model_len=window, tokens=tokens)

    def reasoning(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> ReasoningFormat | None:
        return reasoning_format(tokenizer, prompt.tokens)

    def shown_tokens(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        return frozenset(special_marks(tokenizer).values())

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, **how: Any) -> Prompt:
        thinking = self.thinking.template_kwargs(tokenizer) if self.thinking else {}
        return read_messages(
            self.messages,
            self.tools_in_use,
            tokenizer,
            template_kwargs={**thinking, **self.chat_template_kwargs},
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
