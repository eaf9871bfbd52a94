"""From text to tokens, for text that strangers wrote.

A special token means something to the model: `<|im_end|>` ends a turn. In what a user, a tool or a file says it is only
text, so it is encoded as any other characters are; the special tokens of the chat template stay. And a text that is
far too long is not tokenised to its end to find that out.

A tokenizer's call for one text holds the interpreter from its beginning to its end, and one for a batch does not: the
streams of a coordinator would stand still while a text is read. So all calls here are for a batch.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PIECE = 16_384  # characters that are tokenised at once where only their number counts
_CUT_TOKENS = 16  # more than a cut inside a word can add
_USUAL_BYTES = 8  # a token; ordinary text has fewer, so a text below this is simply encoded

# A special token in a stranger's text is hidden from the template by writing its first character as this number and
# seven digits: digits survive whatever a template does to a text.
_HIDDEN = f"{secrets.randbelow(9 * 10**23) + 10**23}"
_HIDDEN_CHARACTER = re.compile(rf"{_HIDDEN}(\d{{7}})")


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, special_tokens: bool = False, add_special_tokens: bool = False
) -> list[int]:
    """The tokens of a stranger's ``text``.

    Args:
        special_tokens: whether special tokens in the text are read as such.
        add_special_tokens: whether the tokens begin and end as the tokenizer has whole texts begin and end.
    """
    spelling = _spelling(tokenizer)
    if special_tokens or not spelling.is_in(text):
        return _ids(tokenizer.backend_tokenizer, text, add_special_tokens)
    return spelling.encode(text, add_special_tokens=add_special_tokens)


def encode_rendered(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a template's ``text``, in which special tokens of strangers are hidden (`hide`)."""
    spelling = _spelling(tokenizer)
    if _HIDDEN not in text and not spelling.is_normalized:
        return _ids(tokenizer.backend_tokenizer, text)
    return spelling.encode(_shown(spelling.renamed(text)))


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """The text of ``tokens``, special ones included."""
    [text] = tokenizer.backend_tokenizer.decode_batch([tokens], skip_special_tokens=False)
    return str(text)


def hide(tokenizer: PreTrainedTokenizerBase, value: Any) -> Any:
    """``value``, a string or JSON, with every special token in it hidden from the tokenizer until `encode_rendered`."""
    if isinstance(value, str):
        return _spelling(tokenizer).hidden(value)
    if isinstance(value, dict):
        return {hide(tokenizer, name): hide(tokenizer, one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide(tokenizer, one) for one in value]
    return value


def count(tokenizer: PreTrainedTokenizerBase, text: str, *, stop: int | None = None) -> int:
    """The number of tokens of a stranger's ``text``; a number above ``stop`` once it is known to be above that.

    A text of several thousand characters is counted in pieces that end with a line, so that the memory for it does not
    grow with it. The number may be off by a few tokens where a text has no lines.
    """
    number = 0
    for piece in _pieces(text):
        number += len(encode(tokenizer, piece))
        if stop is not None and number > stop:
            break
    return number


def encode_in_pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a stranger's long ``text``, but for some at the ends of pieces, in memory for the tokens alone."""
    return [token for piece in _pieces(text) for token in encode(tokenizer, piece)]


def count_beyond(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> int | None:
    """A number of tokens above ``limit`` that ``text`` has at least; None where it may have no more than ``limit``.

    It reads no more of the text than it must. None may also be said of a text that has a few tokens more.
    """
    text = _shown(text)
    num_bytes = len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
    if num_bytes <= _USUAL_BYTES * limit:
        return None
    longest = _spelling(tokenizer).longest
    if longest and (least := num_bytes // longest) > limit:
        return least
    number = 0
    for piece in _pieces(text):
        number += max(0, len(encode(tokenizer, piece)) - _CUT_TOKENS)
        if number > limit:
            return number
    return None


def _ids(backend: Tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
    if backend.truncation or backend.padding or backend.encode_special_tokens:  # from a call of transformers before
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
    readable = text.encode("utf-8", "replace").decode()  # tokenizers refuse lone surrogates, which JSON can contain
    [encoding] = backend.encode_batch_fast([readable], add_special_tokens=add_special_tokens)
    ids: list[int] = encoding.ids
    return ids


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            # A new line begins a token in every tokenizer that splits text into words; a blank does in most.
            cut = text.rfind("\n", start + _PIECE // 2, end) + 1 or text.rfind(" ", start + _PIECE // 2, end)
            end = cut if cut > start else end
        yield text[start:end]
        start = end


def _shown(text: str) -> str:
    """``text`` with nothing hidden."""
    return _HIDDEN_CHARACTER.sub(lambda hidden: chr(int(hidden[1])), text) if _HIDDEN in text else text


@dataclass(frozen=True)
class _Special:
    id: int
    content: str
    alias: str  # the name that the renamed tokenizer knows it by


class _Spelling:
    """How the special tokens of one tokenizer are written, and a tokenizer to which they are written otherwise.

    Attributes:
        is_normalized: whether a special token is looked for in the text as it is after normalisation. Then a text may
            have one that cannot be seen in it.
        longest: no token stands for more bytes of a text than this; None where that cannot be said, because the
            tokenizer may change or leave out a part of the text.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        added = {token: one for token, one in backend.get_added_tokens_decoder().items() if one.content}
        nonce = secrets.token_hex(16)  # what a stranger could guess would be a special token again
        special = {token: one for token, one in added.items() if one.special}
        self._special = [_Special(token, one.content, f"{nonce}:{token}:") for token, one in special.items()]
        self._by_content = {one.content: one for one in self._special}
        self.is_normalized = backend.normalizer is not None and any(one.normalized for one in special.values())
        # The tokenizer takes the longest of those that begin at the same place.
        contents = sorted((re.escape(one.content) for one in self._special), key=len, reverse=True)
        never = r"(?!)"
        self._any = re.compile("|".join(contents) or never)
        self._begin = re.compile(f"(?=({'|'.join(contents) or never}))(.)", re.DOTALL)
        names = backend.get_vocab().keys() - self._by_content.keys()
        is_exact = backend.normalizer is None and names >= set(ByteLevel.alphabet())
        self.longest = max(len(name.encode()) for name in names) if is_exact else None
        self._renamed: tuple[Tokenizer, dict[int, int]] | None = None

    def is_in(self, text: str) -> bool:
        """Whether the tokenizer may read a special token in ``text``."""
        return self.is_normalized or self._any.search(text) is not None

    def hidden(self, text: str) -> str:
        if not self._any.search(text):
            return text
        return self._begin.sub(lambda found: f"{_HIDDEN}{ord(found[2]):07d}", text)

    def renamed(self, text: str) -> str:
        """``text`` with the names that the renamed tokenizer knows."""
        return self._any.sub(lambda found: self._by_content[found[0]].alias, text)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The tokens of ``text``, in which special tokens have their new names."""
        if self._renamed is None:
            self._renamed = self._rename()
        tokenizer, ids = self._renamed
        return [ids.get(token, token) for token in _ids(tokenizer, text, add_special_tokens)]

    def _rename(self) -> tuple[Tokenizer, dict[int, int]]:
        """The tokenizer with new names for its special tokens, and from its ids of added tokens to the real ones.

        All else stays, so that text around a special token is split and merged as it is around the real one.
        """
        state: dict[str, Any] = json.loads(self._backend.to_str())
        aliases = {one.content: one.alias for one in self._special}
        for one in state["added_tokens"]:
            one["content"] = aliases.get(one["content"], one["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {aliases.get(name, name): token for name, token in model["vocab"].items()}
        else:  # Unigram has scores
            model["vocab"] = [[aliases.get(name, name), score] for name, score in model["vocab"]]
        if "merges" in model:
            pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
            model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & aliases.keys()]
        if model.get("unk_token") in aliases:
            model["unk_token"] = aliases[model["unk_token"]]
        renamed = Tokenizer.from_str(json.dumps(state))
        renamed.no_truncation()
        renamed.no_padding()
        ids: dict[int, int] = {}
        for token, one in self._backend.get_added_tokens_decoder().items():
            new = renamed.token_to_id(aliases.get(one.content, one.content))
            assert new is not None
            ids[new] = token
        return renamed, ids


_spellings: WeakKeyDictionary[PreTrainedTokenizerBase, _Spelling] = WeakKeyDictionary()


def _spelling(tokenizer: PreTrainedTokenizerBase) -> _Spelling:
    if tokenizer not in _spellings:
        _spellings[tokenizer] = _Spelling(tokenizer.backend_tokenizer)
    return _spellings[tokenizer]
