"""The bodies of `POST /tokenize` and `/detokenize`, which are vLLM's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, model_validator

from deployments.schemas.body import MAX_NAME, MAX_TOKENS, AtMost, Body, wrong
from deployments.schemas.messages import ChatMessage, read_messages
from deployments.schemas.tools import Tool
from rapid.errors import InvalidRequest
from rapid.text.encoding import decode, encode
from rapid.text.prompts import check_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_WINDOWS = 16  # of a text that is read, but not by the target as it is


class TokenizeRequest(Body):
    """A plain prompt, or the messages of a chat as the model's template writes them."""

    model: str | None = Field(None, max_length=MAX_NAME)
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], AtMost(4096)] | None = None
    tools: Annotated[list[Tool], AtMost(256)] = Field(default_factory=list)
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

    def tokenized(self, tokenizer: PreTrainedTokenizerBase, window: int, *, special_tokens: bool = False) -> Tokenized:
        """The tokens; ``window`` is how many the model can read, ``special_tokens`` as in `read_chat`.

        Raises:
            ContextLengthExceeded: the text would have more than `MAX_WINDOWS` windows.
            InvalidRequest: the chat template refuses the messages.
        """
        most = MAX_WINDOWS * window
        if self.prompt is None:
            tokens = read_messages(
                self.messages or [],
                self.tools,
                tokenizer,
                template_kwargs=self.chat_template_kwargs,
                special_tokens=special_tokens,
                most_tokens=most,
            ).tokens
        else:
            check_length(tokenizer, self.prompt, most, "prompt")
            add = self.add_special_tokens
            tokens = encode(tokenizer, self.prompt, special_tokens=special_tokens, add_special_tokens=add)
        strings = tokenizer.convert_ids_to_tokens(tokens) if self.return_token_strs else None
        return Tokenized(count=len(tokens), max_model_len=window, tokens=tokens, token_strs=strings)


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    model: str | None = Field(None, max_length=MAX_NAME)
    tokens: Annotated[list[int], AtMost(MAX_TOKENS)]

    def detokenized(self, tokenizer: PreTrainedTokenizerBase) -> Detokenized:
        """The text, special tokens included.

        Raises:
            InvalidRequest: a token does not exist.
        """
        unknown = [token for token in self.tokens if not 0 <= token < len(tokenizer)]
        if unknown:
            raise InvalidRequest(f"tokens: there is no token {unknown[0]}", param="tokens")
        return Detokenized(prompt=decode(tokenizer, self.tokens))


class Detokenized(BaseModel):
    prompt: str
