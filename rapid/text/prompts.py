"""Turns chat messages or a plain prompt into tokens, and decides which part is context and which is the query.

The rule (docs/design.md): a content longer than ``long_content_tokens`` is context, in any message. Short messages of
the history are context too when they are longer than that together; they are shortened exchange by exchange. The query
is the text that the caller names. Else it is the last user message, or what that message asks around its document if it
is long (`rapid.text.question`), or its text beside the documents if it has documents. If a long message asks nothing,
what an earlier short message asks is the query. The drafter reads the same messages, with the retrieved passages in
the place of the context.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from jinja2 import TemplateError

from rapid.errors import ContextLengthExceeded, InvalidRequest
from rapid.text.encoding import count, count_beyond, encode, encode_rendered, hide
from rapid.text.question import Framed, find_question, questions, whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG_CONTENT_TOKENS = 512


Tools = Sequence[dict[str, Any]]


class Message(NamedTuple):
    """One turn of a chat; ``role`` is system, user, assistant or tool.

    ``more`` holds further fields for the chat template. ``documents`` are the (start, end) of the documents in
    ``content``, in order. When the message is long, each document is a content of its own, and the rest of the message
    is not.
    """

    role: str
    content: str
    more: Mapping[str, Any] = MappingProxyType({})
    documents: tuple[tuple[int, int], ...] = ()

    def apart(self) -> tuple[list[str], str]:
        """The documents, and the rest of the message."""
        edges = [0, *(edge for span in self.documents for edge in span), len(self.content)]
        pieces = [self.content[start:end] for start, end in pairwise(edges)]
        rest = [text.strip("\n") for text in pieces[::2]] if self.documents else pieces
        return pieces[1::2], "\n\n".join(text for text in rest if text)


class RetrievedText(Protocol):
    """The part of a retrieved chunk that this module needs: a piece of ``Prompt.contents[content]``."""

    @property
    def content(self) -> int: ...
    @property
    def text(self) -> str: ...


@dataclass(frozen=True)
class _Turn:
    """A message in parts: retrieval may shorten the ``contents``, and the ``rest`` always stays."""

    role: str
    rest: str
    exchange: int | None  # messages of one exchange stay or go together; None: it always stays
    contents: tuple[int, ...] = ()  # indices: this message's own contents, or the one that gathers short messages
    before: str = ""  # stays too, in front of the contents
    is_short: bool = True  # then ``rest`` is the whole message, and nothing of it is cut
    more: Mapping[str, Any] = field(default_factory=dict)

    def shortened(self, kept: dict[int, list[str]]) -> Message:
        if self.is_short:
            return Message(self.role, self.rest, self.more)
        kept_texts = [text for i in self.contents for text in kept.get(i, [])]
        return Message(self.role, self.before + "\n\n".join(kept_texts) + self.rest, self.more)


@dataclass(frozen=True)
class Prompt:
    """A request's prompt: ``tokens`` for the target; ``contents`` and ``query`` for the retriever."""

    tokens: list[int]
    contents: list[str]
    query: str
    _turns: list[_Turn] = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    is_chat: bool = True
    _tools: Tools = ()
    _template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    _special_tokens: bool = False

    def shortened(self, chunks: Iterable[RetrievedText]) -> list[int]:
        """The tokens that the drafter reads: ``chunks``, in document order, replace every long content."""
        kept: dict[int, list[str]] = {}
        for chunk in chunks:
            kept.setdefault(chunk.content, []).append(chunk.text.strip())
        # Only whole exchanges are left out: many templates require that user and assistant take turns.
        retrieved = {turn.exchange for turn in self._turns if any(i in kept for i in turn.contents)}
        dropped = {turn.exchange for turn in self._turns if turn.contents} - retrieved - {None}
        messages = [turn.shortened(kept) for turn in self._turns if turn.exchange not in dropped]
        text = _rendered(
            self.tokenizer, messages, self._tools, self._template_kwargs, self._special_tokens, self.is_chat
        )
        return _encode(self.tokenizer, text, self._special_tokens, self.is_chat)


def read_chat(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    query: str | None = None,
    long_content_tokens: int = LONG_CONTENT_TOKENS,
    tools: Tools = (),
    template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    special_tokens: bool = False,
    most_tokens: int | None = None,
) -> Prompt:
    """Applies the model's chat template and the context rule to ``messages``; ``tools`` are in OpenAI's form.

    Args:
        template_kwargs: further variables for the template.
        special_tokens: whether special tokens in messages, tools and variables are read as such; else they are text.
        most_tokens: a prompt that is far above it is refused before it is tokenised to its end.

    Raises:
        ContextLengthExceeded: the prompt has more than ``most_tokens``. One that has a few more may be read.
        InvalidRequest: there are no messages, or the chat template refuses them or makes nothing of them.
    """
    if not messages:
        raise InvalidRequest("messages must hold at least one message", param="messages")
    text = _rendered(tokenizer, messages, tools, template_kwargs, special_tokens, True)
    check_length(tokenizer, text, most_tokens, "messages")
    tokens = _encode(tokenizer, text, special_tokens, True)
    if not tokens:
        raise InvalidRequest("the chat template makes an empty prompt of these messages", param="messages")
    contents, asked, turns = _divided(messages, tokenizer, long_content_tokens)
    return Prompt(tokens, contents, query or asked, turns, tokenizer, True, tools, template_kwargs, special_tokens)


def read_text(
    text: str | list[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    query: str | None = None,
    long_content_tokens: int = LONG_CONTENT_TOKENS,
    special_tokens: bool = False,
    most_tokens: int | None = None,
) -> Prompt:
    """A prompt without a chat template, under the same rule: its last paragraph is the query, the rest is the context.

    If ``text`` is a list of tokens, the target reads these tokens; the context and the query come from their text.
    ``special_tokens`` and ``most_tokens`` are those of `read_chat`.

    Raises:
        ContextLengthExceeded: the prompt has more than ``most_tokens``. One that has a few more may be read.
        InvalidRequest: the prompt is empty, or has tokens that do not exist.
    """
    if not text:
        raise InvalidRequest("prompt must not be empty", param="prompt")
    if isinstance(text, list):
        tokens = text
        if most_tokens is not None and len(tokens) > most_tokens:
            raise ContextLengthExceeded(prompt_tokens=len(tokens), max_tokens=0, window=most_tokens, param="prompt")
        unknown = [token for token in tokens if not 0 <= token < len(tokenizer)]
        if unknown:
            raise InvalidRequest(f"prompt: there is no token {unknown[0]}", param="prompt")
        text = str(tokenizer.decode(tokens))
    else:
        check_length(tokenizer, text, most_tokens, "prompt")
        tokens = _encode(tokenizer, text, special_tokens, False)
        if not tokens:
            raise InvalidRequest("prompt must not be empty: the tokenizer finds nothing in it", param="prompt")
    contents, asked, turns = _divided([Message("user", text)], tokenizer, long_content_tokens)
    return Prompt(tokens, contents, query or asked, turns, tokenizer, False, _special_tokens=special_tokens)


def _divided(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, long_content_tokens: int
) -> tuple[list[str], str, list[_Turn]]:
    """(contents, the query where none is given, the messages in parts)."""
    sizes = [count(tokenizer, message.content, stop=long_content_tokens) for message in messages]
    users = [i for i, message in enumerate(messages) if message.role == "user"]
    last = users[-1] if users else len(messages) - 1
    is_long = [size > long_content_tokens for size in sizes]

    def in_history(i: int) -> bool:
        return i < last and messages[i].role != "system"

    short_history = [i for i in range(len(messages)) if in_history(i) and not is_long[i]]
    history_is_long = sum(sizes[i] for i in short_history) > long_content_tokens

    contents: list[str] = []
    turns: list[_Turn] = []
    default_query = messages[last].content
    began = -1  # the first message of the current exchange
    gathered: int | None = None  # the content that gathers its short messages
    for i, (role, content, more, _) in enumerate(messages):
        if role == "user":
            began, gathered = i, None
        # A long system message is an exchange of its own.
        exchange = began if in_history(i) else i if role == "system" and is_long[i] else None
        if is_long[i]:
            documents, rest = messages[i].apart()
            framed = Framed("", "", rest and "\n\n" + rest, rest, asks=True)
            if not documents or _is_long(rest, tokenizer, long_content_tokens):
                framed = find_question(rest) if i == last else whole(rest)
                if _is_long(framed.before + framed.behind, tokenizer, long_content_tokens):
                    framed = whole(rest)
                documents.append(framed.document)
            if i == last:
                earlier = [messages[j].content for j in range(i) if not is_long[j] and messages[j].role != "assistant"]
                default_query = (not framed.asks and _asked_before(earlier)) or framed.query or default_query
            numbers = tuple(range(len(contents), len(contents) + len(documents)))
            turns.append(_Turn(role, framed.behind, exchange, numbers, framed.before, is_short=False, more=more))
            contents += documents
        elif in_history(i) and history_is_long:
            if gathered is None:
                gathered = len(contents)
                contents.append(content)
            else:
                contents[gathered] += "\n" + content
            turns.append(_Turn(role, content, exchange, (gathered,), more=more))
        else:
            turns.append(_Turn(role, content, exchange, more=more))
    return contents, default_query, turns


def _asked_before(earlier: list[str]) -> str:
    """What the latest of ``earlier`` messages asks that asks something in more than two words ("Unsure?" is none)."""
    asked = (questions(text) for text in reversed(earlier))
    return next((text for text in asked if len(text.split()) > 2 or (text and not text.isascii())), "")


def _is_long(text: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> bool:
    return count(tokenizer, text, stop=limit) > limit


def check_length(tokenizer: PreTrainedTokenizerBase, text: str, most_tokens: int | None, param: str) -> None:
    """
    Raises:
        ContextLengthExceeded: ``text`` has more than ``most_tokens``; the error names ``param``.
    """
    beyond = None if most_tokens is None else count_beyond(tokenizer, text, most_tokens)
    if most_tokens is not None and beyond is not None:
        raise ContextLengthExceeded(
            prompt_tokens=beyond, max_tokens=0, window=most_tokens, param=param, is_at_least=True
        )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool, is_chat: bool) -> list[int]:
    if is_chat:
        return encode_rendered(tokenizer, text)
    return encode(tokenizer, text, special_tokens=special_tokens, add_special_tokens=True)


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Tools,
    template_kwargs: Mapping[str, Any],
    special_tokens: bool,
    is_chat: bool,
) -> str:
    """The text of a prompt. In a chat's, special tokens that are not the template's own are hidden."""
    if not is_chat:
        return "".join(message.content for message in messages)
    if not tokenizer.chat_template:
        raise InvalidRequest(
            "this model has no chat template; use /v1/completions with a plain prompt", param="messages"
        )

    def text_of(value: Any) -> Any:
        return value if special_tokens else hide(tokenizer, value)

    try:
        text = tokenizer.apply_chat_template(
            [{"role": one.role, "content": text_of(one.content), **text_of(dict(one.more))} for one in messages],
            tools=text_of(list(tools)) or None,
            tokenize=False,
            **{"add_generation_prompt": True, **text_of(dict(template_kwargs))},
        )
    except (TemplateError, TypeError, ValueError, LookupError) as error:  # the last three come from odd variables
        raise InvalidRequest(f"the model's chat template refuses these messages: {error}", param="messages") from error
    return str(text)
