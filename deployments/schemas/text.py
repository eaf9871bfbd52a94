"""The body of `POST /v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from deployments.schemas import ignored
from deployments.schemas.body import MAX_TOKENS, AtMost, wrong
from deployments.schemas.completions import MAX_LOGPROBS, Completion
from deployments.schemas.infill import infill_prompt
from rapid.text.prompts import Prompt, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="as logprobs, of the prompt's tokens")
    echo: bool = False
    best_of: int | None = Field(None, ge=1, description="of so many choices the n likeliest are given out")
    suffix: str = Field("", description="what follows the answer, for models that fill in the middle")

    @model_validator(mode="after")
    def _belong_together(self) -> TextRequest:
        if self.prompt == []:
            raise wrong("prompt", "must hold a prompt")
        if self.max_tokens == 0 and not self.echo:
            raise wrong("max_tokens", "must be greater than 0 without echo")
        if self.num_written < self.n:
            raise wrong("best_of", "must be at least n")
        if self.num_written > self.n and self.stream:
            raise wrong("best_of", "above n is known at the end: set stream to false")
        if self.suffix and not all(isinstance(prompt, str) for prompt in self._prompts):
            raise wrong("suffix", "goes with prompts that are texts")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_written(self) -> int:
        return self.n if self.best_of is None else self.best_of

    @property
    def num_prompt_logprobs(self) -> int | None:
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((number for number in wanted if number is not None), default=None)

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
        prompt = self._prompts[0]
        if self.suffix and isinstance(prompt, str):
            prompt = infill_prompt(tokenizer, prompt, self.suffix)
        return read_text(prompt, tokenizer, query=self.rapid.query, **how)
