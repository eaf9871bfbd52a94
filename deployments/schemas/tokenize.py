"""The bodies of `POST /tokenize` and `/detokenize`, which are vLLM's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, model_validator

from deployments.schemas.body import Body, wrong
from deployments.schemas.messages import ChatMessage, read_messages
from deployments.schemas.tools import Tool
from rapid.errors import InvalidRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenizeRequest(Body):
    """A plain prompt, or the messages of a chat as the model's template writes them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] = Field(default_factory=list)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise wrong("prompt", "send either prompt or messages")
        if self.messages is not None and "add_special_tokens" in self.model_fields_set:
            raise wrong("add_special_tokens", "the chat template says which ones messages have")
        for field in ("tools", "chat_template_kwargs"):
            if getattr(self, field) and self.messages is None:
                raise wrong(field, "goes with messages")
        return self

    def answer(self, tokenizer: PreTrainedTokenizerBase, window: int) -> Tokenized:
        """The tokens; ``window`` is how many the model can read.

        Raises:
            InvalidRequest: the chat template refuses the messages.
        """
        if self.messages is not None:
            kwargs = self.chat_template_kwargs
            tokens = read_messages(self.messages, self.tools, tokenizer, template_kwargs=kwargs).tokens
        else:
            tokens = list(tokenizer(self.prompt, add_special_tokens=self.add_special_tokens)["input_ids"])
        strings = tokenizer.convert_ids_to_tokens(tokens) if self.return_token_strs else None
        return Tokenized(count=len(tokens), max_model_len=window, tokens=tokens, token_strs=strings)


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int]

    def answer(self, tokenizer: PreTrainedTokenizerBase) -> Detokenized:
        """The text, special tokens included.

        Raises:
            InvalidRequest: a token does not exist.
        """
        unknown = [token for token in self.tokens if not 0 <= token < len(tokenizer)]
        if unknown:
            raise InvalidRequest(f"tokens: there is no token {unknown[0]}", param="tokens")
        return Detokenized(prompt=str(tokenizer.decode(self.tokens)))


class Detokenized(BaseModel):
    prompt: str
